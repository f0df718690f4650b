"""Scaled dot-product attention with grouped keys and values."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm_ms.ops.dropout import SeededDropout

# Added to hidden scores. Finite, so that a row that sees no key gives a uniform distribution and not NaN.
HIDDEN_SCORE = float(np.finfo(np.float32).min)


class GroupedAttention(nn.Cell):
    """softmax(q k^T / sqrt(D) + bias) v, where every key/value group serves N/G query heads.

    The query heads of a group are joined along the sequence axis, so that keys and values need not be repeated.

    Args:
        num_heads, head_dim: query heads N, channels D of a head.
        num_groups: key/value heads G; query head n uses group n // (N / G).
        dropout, stream: of attention weights, see `SeededDropout`.
    """

    def __init__(self, num_heads: int, num_groups: int, head_dim: int, dropout: float = 0.0, stream: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_groups, self.per_group = num_heads, num_groups, num_heads // num_groups
        self.head_dim, self.scale = head_dim, 1.0 / math.sqrt(head_dim)
        self.multiply, self.add_bias, self.softmax = ops.Mul(), ops.Add(), ops.Softmax(axis=-1)
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.split_heads, self.merge_heads = ops.Transpose(), ops.Transpose()
        self.reshape, self.cast = ops.Reshape(), ops.Cast()
        self.dropout = SeededDropout(dropout, stream) if dropout > 0 else None

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None) -> Tensor:
        """query [B, S, N, D]; key, value [B, G, T, D]; bias float32 [B or 1, 1, S, T]; seeds int32 [B], None for
        no dropout -> [B, S, N * D]."""
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        groups, per_group, dim = self.num_groups, self.per_group, self.head_dim
        query = self.multiply(query, self.scale)
        query = self.split_heads(self.reshape(query, (batch, length, self.num_heads, dim)), (0, 2, 1, 3))
        query = self.reshape(query, (batch, groups, per_group * length, dim))
        scores = self.cast(self.scores(query, key), ms.float32)
        total = ops.shape(key)[2]
        scores = self.add_bias(self.reshape(scores, (batch, self.num_heads, length, total)), bias)
        weights = self.cast(self.softmax(scores), value.dtype)
        if self.dropout is not None and seeds is not None:
            weights = self.dropout(weights, seeds)
        mixed = self.mix(self.reshape(weights, (batch, groups, per_group * length, total)), value)
        mixed = self.merge_heads(self.reshape(mixed, (batch, self.num_heads, length, dim)), (0, 2, 1, 3))
        return self.reshape(mixed, (batch, length, self.num_heads * dim))
