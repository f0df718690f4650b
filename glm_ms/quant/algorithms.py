"""Floating point weights to integers with scales, in NumPy; symmetric, round to nearest even.

The scale of a group is searched: shrinking the range below the largest weight clips a few weights and lowers the error
of all others. The best of several factors is then improved by least squares: for fixed integers q the scale with the
smallest error is sum(h w q) / sum(h q^2). h are weights of the error, one for each input:

* without calibration h = 1: the squared error of the weights;
* with calibration h = mean(x^2) of the input: then sum(h (w - s q)^2) is the squared error of the result of the layer,
  but for the correlation of its inputs. That a few inputs with large activations decide the error is the finding of
  AWQ (Lin et al. 2023, arXiv:2306.00978), which scales these inputs; here their error counts more, as in the diagonal
  of the Hessian of Optimal Brain Quantization (Frantar & Alistarh 2022, arXiv:2208.11580). Norms stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

INT8_LARGEST = 127
INT4_LOWEST, INT4_HIGHEST = -8, 7
# Scales that are tried, as parts of the one that maps the largest weight to the end of the range.
_INT8_FACTORS = (1.0, 0.98, 0.95, 0.9)
_INT4_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.68, 0.6)
_REFINEMENTS = 2
# Weights that are quantized at a time, so that temporaries stay in the cache of a core.
_CHUNK = 1 << 17


def quantize_int8(weight: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weight [N, K] -> q int8 [N, K] in [-127, 127] and scales float32 [N] with weight ~ q * scale.

    Args:
        weight: any floating type; finite.
        importance: h of every input, [K], not negative; None: 1.
    """
    rows, width = weight.shape
    q, scale = np.empty((rows, width), np.int8), np.empty(rows, np.float32)
    importance = None if importance is None else importance.astype(np.float32)[None]

    def quantize(part: slice) -> None:
        w = weight[part].astype(np.float32)
        first = np.abs(w).max(1, initial=0) / INT8_LARGEST
        q[part], scale[part] = _searched(w, importance, first, _INT8_FACTORS, (-INT8_LARGEST, INT8_LARGEST), np.float32)

    _in_parallel(quantize, rows, width)
    return q, scale


def quantize_int4(
    weight: np.ndarray, group: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight [N, K] -> q int8 [N, K] in [-8, 7] and scales float16 [N, ceil(K / group)] with weight ~ q * scale.

    The range has one number more below zero, so the scale has the sign that maps the largest weight to -8. The last
    group has the inputs that are left. Arguments as of `quantize_int8`.
    """
    rows, width = weight.shape
    groups = -(-width // group)
    padding = groups * group - width
    q, scale = np.empty((rows, width), np.int8), np.empty((rows, groups), np.float16)
    if importance is not None:
        importance = np.pad(importance.astype(np.float32), (0, padding)).reshape(groups, group)

    def quantize(part: slice) -> None:
        w = weight[part].astype(np.float32)
        w = (np.pad(w, ((0, 0), (0, padding))) if padding else w).reshape(-1, group)
        h = None if importance is None else np.tile(importance, (len(w) // groups, 1))
        largest = w[np.arange(len(w)), np.abs(w).argmax(1)]
        found, scales = _searched(
            w, h, largest / INT4_LOWEST, _INT4_FACTORS, (INT4_LOWEST, INT4_HIGHEST), np.float16
        )  # fmt: skip
        q[part] = found.reshape(-1, groups * group)[:, :width]
        scale[part] = scales.reshape(-1, groups)

    _in_parallel(quantize, rows, width)
    return q, scale


def nearest(weight: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """The integers, as float32 [R, W], nearest to weight [R, W] / scale [R]; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale, np.float32), where=scale != 0, dtype=np.float32)
    q = weight * inverse[:, None]
    return np.clip(np.rint(q, out=q), low, high, out=q)


def _searched(
    weight: np.ndarray, importance: np.ndarray | None, first: np.ndarray, factors: tuple[float, ...],
    limits: tuple[int, int], storage: type
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Integers float32 [R, W] and scales [R] of the type `storage`, each row with its best scale.

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


def _in_parallel(work: Callable[[slice], None], rows: int, width: int) -> None:
    """Calls `work` with slices of all rows, on all cores; the result does not depend on them."""
    step = max(1, _CHUNK // max(1, width))
    parts = [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:  # NumPy works without Python's lock
        for _ in pool.map(work, parts):
            pass
