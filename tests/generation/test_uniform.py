"""Numbers of rows whose places are equal in a product of matrices."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, ops

from glm_ms.generation import uniform
from glm_ms.generation.graphs import GRAPHS


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_equal_rows_have_equal_products(count: int) -> None:
    rows = uniform.uniform_rows(count)
    assert count <= rows <= count + 12
    rng = np.random.default_rng(1)
    weight = Tensor(rng.standard_normal((320, 96), np.float32))
    x = rng.standard_normal((rows, 96), np.float32)  # neighbours are others
    found = []
    for place in range(rows):
        x[place] = np.linspace(-1, 1, 96)
        product = GRAPHS.run(ops.MatMul(transpose_b=True), Tensor(x), weight).asnumpy()
        found.append(product[place].tobytes())
        x[place] = rng.standard_normal(96, np.float32)
    assert len(set(found)) == 1


def test_the_number_itself_without_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(uniform, "_places_are_equal", lambda rows: bool(tried.append(rows)))
    with pytest.warns(UserWarning, match="products of 1000 to 1011 rows .* try another number of slots"):
        assert uniform.uniform_rows(1000) == 1000
    assert tried == list(range(1000, 1012))
    uniform.uniform_rows.cache_clear()
