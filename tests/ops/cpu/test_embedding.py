"""Rows of an embedding in bfloat16: values, ids that do not exist, gradient."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from cpu_kernels import bfloat16, from_bfloat16, threads
from cpu_operators import call
from mindspore import Parameter, Tensor, nn

from glm_ms.ops.cpu.embedding import BFloat16Rows

TABLE = bfloat16(np.random.default_rng(0).standard_normal((50, 7), dtype=np.float32))


@pytest.mark.parametrize("shape", [(3, 40), (1,), (0,), (2, 0), (700,)])
def test_rows(shape: tuple[int, ...]) -> None:
    ids = np.random.default_rng(1).integers(0, 50, shape, np.int32)
    for count in (1, 3):
        rows = np.full((*shape, 7), np.nan, np.float32)
        with threads(count):
            assert call("bf16_rows", TABLE, ids, rows) == 0
        np.testing.assert_array_equal(rows, from_bfloat16(TABLE)[ids])


@pytest.mark.parametrize("wrong", [-1, 50, -(2**31), 2**31 - 1])
def test_an_id_outside_the_table_is_an_error(wrong: int) -> None:
    ids, rows = np.array([3, wrong, 49], np.int32), np.zeros((3, 7), np.float32)
    assert call("bf16_rows", TABLE, ids, rows) == 1


class Network(nn.Cell):
    """A function of rows whose gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = Parameter(Tensor(from_bfloat16(TABLE), ms.bfloat16), name="table"), BFloat16Rows()

    def construct(self, ids: Tensor) -> Tensor:
        """Squares of the rows."""
        return self.rows(self.table, ids, 0) ** 2


def test_in_a_graph_of_any_shape_with_the_gradient_of_the_table() -> None:
    with threads(2):
        ms.set_context(mode=ms.GRAPH_MODE)
        network = Network()
        network.set_inputs(Tensor(shape=[None, None], dtype=ms.int32))
        for shape in ((2, 5), (1, 30)):
            ids = np.random.default_rng(2).integers(0, 9, shape, np.int32)
            rows = from_bfloat16(TABLE)[ids]
            np.testing.assert_array_equal(network(Tensor(ids)).asnumpy(), rows**2)
            (found,) = ms.grad(network, None, network.trainable_params())(Tensor(ids))
            expected = np.zeros((50, 7), np.float32)
            np.add.at(expected, ids, 2 * rows)
            assert found.dtype == ms.bfloat16
            np.testing.assert_allclose(found.astype(ms.float32).asnumpy(), expected, rtol=2**-8)
