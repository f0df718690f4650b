"""Rounding that compensates errors: the weights that are still to be rounded make up for those that are.

The squared error of the results of a layer with inputs X [tokens, K] and an error d [K] of the weights of an output is
d H d^T with H = X^T X. With H = L L^T, L lower triangular, it is the sum over the inputs j of
(d_j + sum over i > j of d_i L_ij / L_jj)^2 L_jj^2. So inputs are rounded from the last to the first, each to the value
that is nearest to its weight plus the second term: what the later ones have lost. This is GPTQ (Frantar et al. 2022,
arXiv:2210.17323) from the other end, without an inverse of H; the equality is that with Babai's nearest plane (Chen et
al. 2025, arXiv:2507.18553). L_jj^2 is what an error of input j counts when all earlier inputs can make up for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Added to the diagonal of H, as parts of its mean and of itself: inputs that few texts have, or none, stay near their
# weights, and rounding of the arithmetic does not make H indefinite.
_DAMPING, _RELATIVE_DAMPING = 0.01, 1e-4
_BLOCK = 1024
# Inputs whose errors are added to the earlier ones together.
_COLUMNS = 32


@dataclass(frozen=True)
class Inputs:
    """What a layer is given on real text, as the compensation needs it.

    Attributes:
        lower: L_ij / L_jj of the factor of H, float32 [K, K]; what is above the diagonal is not defined.
        importance: L_jj^2, float32 [K], positive.
    """

    lower: np.ndarray
    importance: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> Inputs:
        """Of H / tokens, float32 [K, K], of which the lower triangle is read; its memory becomes `lower`."""
        diagonal = np.einsum("kk->k", moments)
        diagonal += _DAMPING * (diagonal.mean() or 1) + _RELATIVE_DAMPING * diagonal
        _factor(moments)
        pivots = diagonal.copy()
        for start in range(0, len(moments), _BLOCK):  # without a second matrix
            moments[start : start + _BLOCK] /= pivots
        return cls(moments, np.square(pivots))


def _factor(matrix: np.ndarray) -> None:
    """The lower triangle of a positive definite matrix, float32 [K, K], becomes its Cholesky factor.

    In place, in blocks that are computed in float64: float32 alone fails where a few inputs are much larger.
    """
    for start in range(0, len(matrix), _BLOCK):
        end = min(len(matrix), start + _BLOCK)
        panel = matrix[start:, start:end].astype(np.float64)
        for done in range(0, start, _BLOCK):
            left = matrix[start:, done : done + _BLOCK].astype(np.float64)
            panel -= left @ left[: end - start].T
        corner = np.linalg.cholesky(panel[: end - start])
        matrix[start:end, start:end] = corner
        matrix[end:, start:end] = np.linalg.solve(corner, panel[end - start :].T).T


def round_compensated(
    weight: np.ndarray, inputs: Inputs, width: int, limits: tuple[int, int],
    scale_of: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Weight float32 [N, K] -> q int8 [N, K] and scales [N, ceil(K / width)] with results near those of the weight.

    Args:
        width: inputs that share a scale.
        limits: the lowest and the highest integer.
        scale_of: (values [N, W] to round, importance [W]) -> scales [N], of the inputs of one scale.
    """
    columns = np.ascontiguousarray(weight.T)
    errors, q, scales = np.zeros_like(columns), np.empty(columns.shape, np.int8), []
    for start in reversed(range(0, len(columns), width)):
        end = min(len(columns), start + width)
        wanted = columns[start:end] + inputs.lower[end:, start:end].T @ errors[end:]
        scales.append(scale_of(np.ascontiguousarray(wanted.T), inputs.importance[start:end]))
        group, lower = slice(start, end), inputs.lower[start:end, start:end]
        _round_group(columns[group], wanted, lower, scales[-1].astype(np.float32), limits, q[group], errors[group])
    return np.ascontiguousarray(q.T), np.stack(scales[::-1], axis=1)


def _round_group(
    columns: np.ndarray, wanted: np.ndarray, lower: np.ndarray, scale: np.ndarray, limits: tuple[int, int],
    q: np.ndarray, errors: np.ndarray
) -> None:  # fmt: skip
    """Rounds weights [W, N] of one scale [N], from the last input to the first; writes q and errors [W, N].

    `wanted` are the weights plus what the inputs behind the group have lost; it is used up.
    """
    finite = np.isfinite(scale)  # the caller refuses others
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=finite & (scale != 0))
    scale = np.where(finite, scale, 0)
    for start in reversed(range(0, len(columns), _COLUMNS)):
        end = min(len(columns), start + _COLUMNS)
        for place in reversed(range(start, end)):
            integers = np.clip(np.rint(wanted[place] * inverse), *limits)
            q[place] = integers
            errors[place] = columns[place] - integers * scale
            wanted[start:place] += lower[place, start:place, None] * errors[place]
        wanted[:start] += lower[start:end, :start].T @ errors[start:end]
