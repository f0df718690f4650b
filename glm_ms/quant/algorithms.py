"""Floating point weights to integers with scales, in NumPy; symmetric, round to nearest even.

The scale of a group is searched: shrinking the range below the largest weight clips a few weights and lowers the error
of all others. The best of several factors is then improved by least squares: for fixed integers q the scale with the
smallest error is sum(h w q) / sum(h q^2). h are weights of the error, one for each input: 1, or with the inputs that a
layer has on real text (`glm_ms.quant.calibration`) what remains of them in `glm_ms.quant.compensation`, which then
rounds so that the errors of the weights cancel in the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from glm_ms.quant.compensation import Inputs, round_compensated

INT8_LARGEST = 127
INT4_LOWEST, INT4_HIGHEST = -8, 7
# Scales that are tried, as parts of the one that maps the largest weight to the end of the range.
_INT8_FACTORS = (1.0, 0.98, 0.95, 0.9)
_INT4_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.68, 0.6)
_REFINEMENTS = 2
# Weights that are quantized at a time, so that temporaries stay in the cache of a core.
_CHUNK = 1 << 17
_COMPENSATED_ROWS = 256


def quantize_int8(weight: np.ndarray, inputs: Inputs | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weight [N, K] -> q int8 [N, K] in [-127, 127] and scales float32 [N] with weight ~ q * scale.

    Args:
        weight: any floating type; finite.
        inputs: of the layer: the error of its results becomes small; None: that of the weights.
    """
    rows, width = weight.shape
    q, scale = np.empty((rows, width), np.int8), np.empty(rows, np.float32)

    def quantize(part: slice) -> None:
        w = weight[part].astype(np.float32)
        if inputs is None:
            q[part], scale[part] = _int8(w, None)
        else:
            limits = (-INT8_LARGEST, INT8_LARGEST)
            q[part], scale[part, None] = round_compensated(w, inputs, width, limits, lambda *of: _int8(*of)[1])

    _in_parallel(quantize, rows, _step(width, inputs))
    return q, scale


def _int8(weight: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Integers float32 [R, K] and scales float32 [R]."""
    first = np.abs(weight).max(1, initial=0) / INT8_LARGEST
    return _searched(weight, importance, first, _INT8_FACTORS, (-INT8_LARGEST, INT8_LARGEST), np.float32)


def quantize_int4(weight: np.ndarray, group: int, inputs: Inputs | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weight [N, K] -> q int8 [N, K] in [-8, 7] and scales float16 [N, ceil(K / group)] with weight ~ q * scale.

    The range has one number more below zero, so the scale has the sign that maps the largest weight to -8. The last
    group has the inputs that are left. Arguments as of `quantize_int8`.
    """
    rows, width = weight.shape
    groups = -(-width // group)
    padding = groups * group - width
    q, scale = np.empty((rows, width), np.int8), np.empty((rows, groups), np.float16)

    def quantize(part: slice) -> None:
        w = weight[part].astype(np.float32)
        if inputs is not None:
            limits = (INT4_LOWEST, INT4_HIGHEST)
            q[part], scale[part] = round_compensated(w, inputs, group, limits, lambda *of: _int4(*of)[1])
            return
        w = (np.pad(w, ((0, 0), (0, padding))) if padding else w).reshape(-1, group)
        found, scales = _int4(w, None)
        q[part] = found.reshape(-1, groups * group)[:, :width]
        scale[part] = scales.reshape(-1, groups)

    _in_parallel(quantize, rows, _step(width, inputs))
    return q, scale


def _int4(weight: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Integers float32 [R, W] and scales float16 [R] of groups."""
    largest = weight[np.arange(len(weight)), np.abs(weight).argmax(1)]
    limits = (INT4_LOWEST, INT4_HIGHEST)
    return _searched(weight, importance, largest / INT4_LOWEST, _INT4_FACTORS, limits, np.float16)


def nearest(weight: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """The integers, as float32 [R, W], nearest to weight [R, W] / scale [R]; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale, np.float32), where=scale != 0, dtype=np.float32)
    q = weight * inverse[:, None]
    return np.clip(np.rint(q, out=q), low, high, out=q)


def _searched(
    weight: np.ndarray, importance: np.ndarray | None, first: np.ndarray, factors: tuple[float, ...],
    limits: tuple[int, int], storage: type
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Integers float32 [R, W] and scales [R] of the type `storage`, each row with its best scale; importance h [W].

    Scales are rounded to their storage type before they are judged; if one overflows it, nothing is searched.
    """
    with np.errstate(over="ignore"):  # the caller refuses scales that are not finite
        scale = first.astype(storage).astype(np.float32)
    q = nearest(weight, scale, *limits)
    if not np.isfinite(scale).all():
        return q, scale.astype(storage)
    error = _error(weight, importance, q, scale)

    def keep_better(candidate: np.ndarray) -> None:
        candidate = candidate.astype(storage).astype(np.float32)
        other = nearest(weight, candidate, *limits)
        other_error = _error(weight, importance, other, candidate)
        better = other_error < error
        q[better], scale[better], error[better] = other[better], candidate[better], other_error[better]

    for factor in factors:
        if factor != 1:
            keep_better(first * np.float32(factor))
    for _ in range(_REFINEMENTS):
        weighted = q if importance is None else q * importance
        squares = np.einsum("rw,rw->r", weighted, q)
        fitted = np.einsum("rw,rw->r", weighted, weight)
        keep_better(np.divide(fitted, squares, out=scale.copy(), where=squares > 0))
    return q, scale.astype(storage)


def _error(weight: np.ndarray, importance: np.ndarray | None, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """sum(h (w - s q)^2) of every row, float32 [R]."""
    difference = q * scale[:, None]
    difference -= weight
    weighted = difference if importance is None else difference * importance
    return np.einsum("rw,rw->r", weighted, difference)


def _step(width: int, inputs: Inputs | None) -> int:
    """Rows that are quantized at a time; products with the matrix of the inputs want many."""
    return max(1, _CHUNK // max(1, width)) if inputs is None else _COMPENSATED_ROWS


def _in_parallel(work: Callable[[slice], None], rows: int, step: int) -> None:
    """Calls `work` with slices of `step` rows, on all cores."""
    parts = [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:  # NumPy works without Python's lock
        for _ in pool.map(work, parts):
            pass
