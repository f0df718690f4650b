"""How many rows a product of matrices may have so that a row gets the same bits in every place.

Kernels take rows in groups and compute what is left over with another order of additions, which changes the last
digits: MindSpore's on x86 takes 6 rows, and 1, 2 or 3 that are left over differ.
"""

from __future__ import annotations

import warnings
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from glm_ms.generation.graphs import GRAPHS

# Inputs and outputs of the products that are tried.
_SHAPES = ((64, 96), (256, 1024))
_MOST_IDLE = 12


@cache
def uniform_rows(count: int) -> int:
    """The smallest number of rows from `count` on whose places are equal; `count` if there is none near it.

    Only tried on CPU. Other devices have `count`.

    Warns:
        UserWarning: there is none near it.
    """
    if count == 1 or ms.get_context("device_target") != "CPU":
        return count
    for rows in range(count, count + _MOST_IDLE):
        if GRAPHS.run(_places_are_equal, rows):
            return rows
    warnings.warn(
        f"products of {count} to {count + _MOST_IDLE - 1} rows give equal rows other digits on this machine: by "
        "rounding an answer may depend on what else runs; try another number of slots",
        UserWarning,
        stacklevel=2,
    )
    return count


def _places_are_equal(rows: int) -> bool:
    rng, product = np.random.default_rng(0), ops.MatMul(transpose_b=True)
    for inputs, outputs in _SHAPES:
        x = np.tile(rng.standard_normal(inputs, np.float32), (rows, 1))
        weight = rng.standard_normal((outputs, inputs), np.float32)
        found = product(Tensor(x), Tensor(weight)).asnumpy()
        if (found != found[0]).any():
            return False
    return True
