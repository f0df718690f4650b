"""Portable operators: cells without parameters, whose MindSpore primitives are attributes.

So a parallel strategy can be attached to each primitive from outside, and a fused kernel can replace a cell.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.functional import isconstant

# Added to hidden scores. Finite, so that a row that sees no key gives a uniform distribution and not NaN.
HIDDEN_SCORE = float(np.finfo(np.float32).min)

# Multipliers of a 32-bit integer hash with little bias (C. Wellons, "Prospecting for hash functions", 2018).
_FIRST, _SECOND = (np.array([0x7FEB352D, 0x846CA68B], np.uint32).view(np.int32)).tolist()
# 2^32 divided by the golden ratio, odd: spreads neighbouring places over all integers before they are mixed.
_STRIDE = int(np.array([0x9E3779B9], np.uint32).view(np.int32)[0])


class RMSNormalize(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in float32. Zhang & Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.square, self.mean, self.add = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Add()
        self.rsqrt, self.scale, self.weigh = ops.Rsqrt(), ops.Mul(), ops.Mul()
        self.cast, self.cast_weight = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., H], weight [H] -> [..., H], type of x."""
        y = self.cast(x, ms.float32)
        y = self.scale(y, self.rsqrt(self.add(self.mean(self.square(y), -1), self.eps)))
        return self.cast(self.weigh(y, self.cast_weight(weight, ms.float32)), x.dtype)


class LayerNormalize(nn.Cell):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in float32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.normalize = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.cast, self.cast_weight = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [..., H], weight [H], bias [H] -> [..., H], type of x."""
        y, _, _ = self.normalize(
            self.cast(x, ms.float32), self.cast_weight(weight, ms.float32), self.cast_weight(bias, ms.float32)
        )
        return self.cast(y, x.dtype)


class SwiGLU(nn.Cell):
    """silu(first half) * second half of the last axis, silu(x) = x sigmoid(x). Shazeer 2020, arXiv:2002.05202."""

    def __init__(self) -> None:
        super().__init__()
        self.split = ops.Split(axis=-1, output_num=2)
        self.sigmoid, self.gate, self.mul = ops.Sigmoid(), ops.Mul(), ops.Mul()

    def construct(self, x: Tensor) -> Tensor:
        """x [..., 2F] -> [..., F]."""
        gate, up = self.split(x)
        return self.gated(gate, up)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., F] -> silu(gate) * up [..., F]."""
        return self.mul(self.gate(gate, self.sigmoid(gate)), up)


def rotary_tables(num_positions: int, head_dim: int, rope_ratio: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position, each float32 [num_positions, head_dim].

    Pair i of the first half of a head turns by position * theta_i, theta_i = (10000 * rope_ratio)^(-2i / (head_dim/2));
    the other half has cosine 1 and sine 0. Angles are computed in float32 as in the reference, so that both round
    equally at far positions.
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
    """Rotates heads by their positions: x cos + (x R) sin, see `pair_rotation`; `dtype` is the compute type.

    The quarter turn is a product with a constant matrix: exact, and on a CPU 3 to 9 times faster than
    slicing or reversing pairs (4 x 192 x 34 heads x 128: 12 ms against 65 and 107).
    """

    def __init__(self, head_dim: int, dtype: ms.Type) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotation = Tensor(pair_rotation(head_dim), dtype)
        self.turn, self.mul_cos, self.mul_sin, self.add = ops.MatMul(), ops.Mul(), ops.Mul(), ops.Add()
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D] -> [B, S, N, D]."""
        turned = self.reshape(self.turn(self.reshape(x, (-1, self.head_dim)), self.rotation), ops.shape(x))
        return self.add(self.mul_cos(x, cos), self.mul_sin(turned, sin))


class AttentionBias(nn.Cell):
    """0 where a query may look at a key, HIDDEN_SCORE elsewhere.

    A key is hidden if it comes after the query or is padding. Queries that are padding see every key, future and
    padding too: the reference does this to keep their rows free of NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.later, self.is_padding, self.is_real = ops.Greater(), ops.Equal(), ops.NotEqual()
        self.either, self.both = ops.LogicalOr(), ops.LogicalAnd()
        self.cast, self.multiply = ops.Cast(), ops.Mul()
        self.expand_slots, self.expand_mask, self.expand_heads = (ops.ExpandDims() for _ in range(3))

    def construct(self, query_slots: Tensor, key_slots: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
        """Places in the sequence (padding counts) int32 [S] and [T], masks int32 [B, S] and [B, T], 0 on padding
        -> float32 [B, 1, S, T]."""
        later = self.later(self.expand_slots(key_slots, 0), self.expand_slots(query_slots, 1))
        padding = self.expand_heads(self.expand_mask(self.is_padding(key_mask, 0), 1), 1)
        real_query = self.expand_heads(self.expand_mask(self.is_real(query_mask, 0), 1), 3)
        hidden = self.both(self.either(later, padding), real_query)
        return self.multiply(self.cast(hidden, ms.float32), HIDDEN_SCORE)


class HeadGroups(nn.Cell):
    """softmax(q k^T / sqrt(D) + bias) v, where every key/value group serves N/G query heads: common base.

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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None) -> Tensor:
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


class GroupedAttention(HeadGroups):
    """Attention over given keys and values; arguments as of `HeadGroups`."""

    def __init__(self, num_heads: int, num_groups: int, head_dim: int, dropout: float = 0.0, stream: int = 0) -> None:
        super().__init__(num_heads, num_groups, head_dim, dropout, stream)
        self.split_key, self.split_value = ops.Transpose(), ops.Transpose()

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None) -> Tensor:
        """key, value [B, T, G, D]; others as `HeadGroups.attend`."""
        key, value = self.split_key(key, (0, 2, 1, 3)), self.split_value(value, (0, 2, 1, 3))
        return self.attend(query, key, value, bias, seeds)


class CachedAttention(HeadGroups):
    """Attention over keys and values in tables, to which it first adds those of new tokens; no dropout.

    Tables are flat: a row is a key or value of one group, see `glm_ms.model.cache.KVCache`.
    """

    # Whether the cell needs tables of whole pages, see `glm_ms.model.cache.BlockCache`.
    whole_pages = False

    def __init__(self, num_heads: int, num_groups: int, head_dim: int) -> None:
        super().__init__(num_heads, num_groups, head_dim)
        self.write, self.gather = ops.ScatterUpdate(), ops.Gather()

    def all_of(self, new: Tensor, table: Tensor, rows: Tensor, blocks: Tensor | None, block: int, total: int) -> Tensor:
        """Writes new keys or values [B, S, G, D] to rows of a table; returns all of each row, [B, G, T, D]."""
        whole = self.write(table, rows, self.reshape(new, (-1, self.head_dim)))
        if blocks is not None:
            whole = self.gather(self.reshape(whole, (-1, block * self.head_dim)), blocks, 0)
        return self.reshape(whole, (ops.shape(new)[0], self.num_groups, total, self.head_dim))

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, cache: tuple) -> Tensor:
        """query [B, S, N, D]; key, value [B, S, G, D]; bias float32 [B, 1, S, T]; for the cache see `Cache` in
        `glm_ms.model.glm` -> [B, S, N * D]."""
        total = ops.shape(bias)[3]
        key = self.all_of(key, cache[0], cache[2], cache[3], cache[4], total)
        value = self.all_of(value, cache[1], cache[2], cache[3], cache[4], total)
        return self.attend(query, key, value, bias)


class SeededDropout(nn.Cell):
    """Zeroes elements with probability p in (0, 1) and scales the others by 1 / (1 - p).

    Whether an element stays depends only on the seed of its row, on `stream` and on its place in the row, not on the
    batch or the number of devices; so a resumed run repeats it without saved state. Each dropout of a network has
    another stream. After the counter-based generators of Salmon et al. 2011, "Parallel random numbers: as easy as 1,
    2, 3".
    """

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        self.scale = 1.0 / (1.0 - p)
        self.threshold = round(p * 2.0**32) - 2**31  # of 32 random bits, read as int32
        self.offset = int(np.array([stream * 0x85EBCA6B % 2**32], np.uint32).view(np.int32)[0])
        self.xor, self.bits, self.shift = ops.BitwiseXor(), ops.BitwiseAnd(), ops.RightShift()
        self.add_stream, self.add_place, self.mul = ops.Add(), ops.Add(), ops.Mul()
        self.keep, self.apply, self.rescale = ops.GreaterEqual(), ops.Mul(), ops.Mul()
        self.cast, self.reshape = ops.Cast(), ops.Reshape()

    def fold(self, h: Tensor, distance: int) -> Tensor:
        """h ^ (h >> distance) with zeros shifted in: int32 shifts copy the sign."""
        moved = self.bits(self.shift(h, Tensor(distance, ms.int32)), (1 << (32 - distance)) - 1)
        return self.xor(h, moved)

    def mix(self, h: Tensor) -> Tensor:
        """Scatters int32 values evenly over all int32 values."""
        h = self.mul(self.fold(h, 16), _FIRST)
        h = self.mul(self.fold(h, 15), _SECOND)
        return self.fold(h, 16)

    def places(self, size: int, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
        """A different integer for each place along an axis of `size`, int32 [*before, size, *after]; a constant unless
        the size is known only when the graph runs."""
        if isconstant(size):
            numbers = np.arange(1, size + 1, dtype=np.int64) * _STRIDE
            return Tensor(numbers.astype(np.int32).reshape(before + (size,) + after))  # noqa: RUF005, for the compiler
        numbers = self.cast(ops.range(1, size + 1, 1), ms.int32) * _STRIDE
        return self.reshape(numbers, before + (size,) + after)  # noqa: RUF005

    def construct(self, x: Tensor, seeds: Tensor) -> Tensor:
        """x [B, ...] of at least two axes, seeds int32 [B] -> [B, ...], type of x.

        Of packed rows x is [tokens, 1, ...] and seeds are int32 [tokens, 2]: that of the row, place in the row."""
        shape = ops.shape(x)
        column = (shape[0],) + (1,) * (len(shape) - 1)
        packed = len(ops.shape(seeds)) == 2
        seed = seeds[:, 0] if packed else seeds
        h = self.mix(self.add_stream(self.reshape(seed, column), self.offset))
        if packed:
            h = self.mix(self.add_place(h, (self.reshape(seeds[:, 1], column) + 1) * _STRIDE))
        for axis in range(2 if packed else 1, len(shape)):
            # One axis at a time: the places along it are few numbers, and the hash grows by broadcasting.
            places = self.places(shape[axis], (1,) * axis, (1,) * (len(shape) - 1 - axis))
            h = self.mix(self.add_place(h, places))
        keep = self.keep(h, self.threshold)
        return self.rescale(self.apply(x, self.cast(keep, x.dtype)), self.cast(self.scale, x.dtype))
