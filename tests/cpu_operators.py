"""Calls custom operators of the C++ library on NumPy arrays, without a graph."""

from __future__ import annotations

import ctypes

import numpy as np
from cpu_kernels import kernels


def call(name: str, *arrays: np.ndarray, library: ctypes.CDLL | None = None) -> int:
    """Runs `glm_ms_op_<name>` on its inputs and, behind them, its outputs; returns its status."""
    count = len(arrays)
    assert all(array.flags.c_contiguous for array in arrays)
    shapes = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
    return getattr(library or kernels(), f"glm_ms_op_{name}")(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
        None,
        None,
        None,
    )
