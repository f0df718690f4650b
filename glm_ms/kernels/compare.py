"""Compares a fused kernel with its portable operator, and a portable operator with NumPy, on the current device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm_ms.kernels.cases import KernelCase, normal

# What a kernel that is missing, refused or broken raises.
DEVICE_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, MemoryError)
# Distance from 1 to the next number, by which differences are measured.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_REPEATS = 10
# A gradient passes through the kernel and its adjoint.
_GRADIENT_FACTOR = 2
# Half types are summed in float32 and rounded a few times; float32 is rounded at every addition.
_FLOAT32_FACTOR = 4


def against_numpy(case: KernelCase) -> tuple[float, float, None, float]:
    """The portable operator in float32 against the formula in float64: largest difference, allowed one, None,
    milliseconds of a call."""
    found, portable_ms = _timed(case.reference("float32"), case.tensors("float32"), _REPEATS)
    expected = case.exact(*(array.astype(np.float64) for array in case.inputs))
    return (*_compare(found, [expected], "float32", case.roundings), None, portable_ms)


def against_portable(
    case: KernelCase, dtype: str, gradients: bool = False, repeats: int = _REPEATS
) -> tuple[float, float, float, float]:
    """The fused kernel of this device against the portable operator: the result, or with `gradients` those of
    `case.differentiable`.

    Returns the largest difference, the allowed one, and milliseconds of a call, fused and portable; without `repeats`
    those are 0. Raises one of DEVICE_ERRORS for a kernel that does not run.
    """
    inputs, roundings = case.tensors(dtype), case.roundings
    cells: list[nn.Cell] = [case.reference(dtype), case.fused(dtype)]
    if gradients:
        weights = normal(np.random.default_rng(1), *case.result_shape)
        inputs, cells = [Tensor(weights), *inputs], [_Gradients(cell, case.differentiable) for cell in cells]
        roundings *= _GRADIENT_FACTOR
    (expected, portable_ms), (found, fused_ms) = (_timed(cell, inputs, repeats) for cell in cells)
    return (*_compare(found, list(map(_array, expected)), dtype, roundings), fused_ms, portable_ms)


class _Gradients(nn.Cell):
    """Gradients, for the inputs at some positions, of the sum of a cell's result times weights: not all are 1."""

    def __init__(self, cell: nn.Cell, positions: Sequence[int]) -> None:
        super().__init__(auto_prefix=False)
        self.gradients = ops.grad(_Weighed(cell), tuple(i + 1 for i in positions))

    def construct(self, weights: Tensor, *inputs: Tensor) -> Any:
        """weights float32, of the shape of the result, and the inputs of the cell."""
        return self.gradients(weights, *inputs)


class _Weighed(nn.Cell):
    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell, self.sum, self.cast = cell, ops.ReduceSum(), ops.Cast()

    def construct(self, weights: Tensor, *inputs: Tensor) -> Tensor:
        return self.sum(self.cast(self.cell(*inputs), ms.float32) * weights)


def _timed(cell: nn.Cell, inputs: Sequence[Tensor], repeats: int) -> tuple[list[Tensor], float]:
    """Results, and milliseconds of a call after the one that compiles; reading a result waits for the device."""
    run: Callable[..., Any] = cell.compile_and_run
    results: list[Tensor] = []
    elapsed = 0.0
    for count in (1, repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = run(*inputs)
            results = [result] if isinstance(result, Tensor) else list(result)
        if count:
            _array(results[0])
            elapsed = (time.perf_counter() - start) / count * 1e3
    return results, elapsed


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


def _compare(
    found: Sequence[Tensor], expected: Sequence[np.ndarray], dtype: str, roundings: int
) -> tuple[float, float]:
    """Largest difference and allowed one, of the result with the largest ratio; ValueError for a wrong shape."""
    roundings *= _FLOAT32_FACTOR if dtype == "float32" else 1
    worst = (0.0, 0.0, -1.0)
    for tensor, wanted in zip(found, expected):
        if tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"shape {tuple(tensor.shape)}, expected {wanted.shape}")
        difference = float(np.abs(_array(tensor) - wanted).max())
        allowed = float(roundings * EPS[dtype] * np.abs(wanted).max())
        ratio = difference / allowed if allowed and difference == difference else float("inf")
        if ratio > worst[2]:
            worst = (difference, allowed, ratio)
    return worst[:2]
