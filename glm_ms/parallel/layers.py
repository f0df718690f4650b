"""Cells of a network whose weights are split over cards, the network built of them, and its loss.

Between two layers hidden states have two axes, [M, H] with M = B * S: their rows can then be split over all cards of a
stage, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import MLP, Cache, Cells, GLMNetwork, Prefix, Seeds, SelfAttention
from glm_ms.model.layers import DTYPES, LINEARS, Embedding, Parts, build_linear
from glm_ms.model.loss import IGNORED_LABEL
from glm_ms.ops.portable import SeededDropout, pair_rotation
from glm_ms.parallel.config import ParallelConfig, kv_copies


class FlatEmbedding(Embedding):
    """An embedding whose result has no batch axis."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.width = config.hidden_size
        self.reshape = ops.Reshape()

    def construct(self, input_ids: Tensor) -> Tensor:
        """input_ids int32 [B, S] -> [M, H] of the compute type."""
        return self.reshape(super().construct(input_ids), (-1, self.width))


class FlatDropout(nn.Cell):
    """`SeededDropout` of rows without a batch axis. The mask depends on the batch row, so the axis is added for it."""

    def __init__(self, p: float, stream: int, width: int) -> None:
        super().__init__()
        self.drop, self.width = SeededDropout(p, stream), width
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor, seeds: Tensor) -> Tensor:
        """x [M, H], seeds int32 [B] -> [M, H]."""
        x = self.reshape(x, (ops.shape(seeds)[0], -1, self.width))
        return self.reshape(self.drop(x, seeds), (-1, self.width))


class PartedLinear(nn.Cell):
    """A linear layer with one weight for each part, so that every part can be split evenly over the cards.

    If the joint weight [q | k | v] were cut into equal pieces, no card would have whole heads.

    Args and attributes: as `Linear`; the name of a part is the name of its cell.
    """

    def __init__(
        self, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, DTYPES[config.compute_dtype]
        self.lora: nn.Cell | None = None
        for name, rows in parts.items():
            setattr(self, name, build_linear("plain", config, in_features, rows, has_bias))
        self.parts = tuple(getattr(self, name) for name in parts)
        self.slices, self.adds = [ops.StridedSlice() for _ in parts], [ops.Add() for _ in parts]

    def construct(self, x: Tensor, seeds: Seeds = None) -> tuple[Tensor, ...]:
        """x [M, in] -> one [M, rows] for each part. The low-rank update of all parts is one product."""
        results = ()  # type: tuple
        for part in self.parts:
            results += (part(x),)
        if self.lora is None:
            return results
        update = self.lora(x, seeds)
        rows, begin = ops.shape(update)[0], 0
        updated = ()  # type: tuple
        for i in range(len(self.parts)):
            end = begin + self.parts[i].out_features
            piece = self.slices[i](update, (0, begin), (rows, end), (1, 1))
            updated += (self.adds[i](results[i], piece),)
            begin = end
        return updated


def sharded_linear(config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts) -> nn.Cell:
    """A joint layer in parts; other layers are plain. `glm_ms.parallel.strategies` says how each is cut."""
    if parts is None:
        return build_linear("plain", config, in_features, out_features, has_bias)
    return PartedLinear(config, in_features, out_features, has_bias, parts)


LINEARS["sharded"] = sharded_linear


class HeadRotary(nn.Cell):
    """`ApplyRotary` for heads that are split over cards: the same product, with the head axis kept."""

    def __init__(self, head_dim: int, dtype: ms.Type) -> None:
        super().__init__()
        self.rotation = Tensor(pair_rotation(head_dim)[None, None], dtype)
        self.turn, self.mul_cos, self.mul_sin, self.add = ops.BatchMatMul(), ops.Mul(), ops.Mul(), ops.Add()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D] -> [B, S, N, D]."""
        return self.add(self.mul_cos(x, cos), self.mul_sin(self.turn(x, self.rotation), sin))


class RepeatHeads(nn.Cell):
    """Repeats every key/value head `copies` times, so that each card of the model-parallel group has one."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies, self.tile, self.reshape = copies, ops.Tile(), ops.Reshape()

    def construct(self, x: Tensor) -> Tensor:
        """x [B, T, G, D] -> [B, T, G * copies, D]; head g becomes heads g * copies and following."""
        batch, length, groups, dim = ops.shape(x)
        x = self.tile(self.reshape(x, (batch, length, groups, 1, dim)), (1, 1, 1, self.copies, 1))
        return self.reshape(x, (batch, length, groups * self.copies, dim))


class ShardedAttention(SelfAttention):
    """Attention with separate projections and `copies` of each key/value head, over rows without a batch axis."""

    def __init__(self, config: GLMConfig, index: int, linear: str, copies: int) -> None:
        super().__init__(config, index, linear, copies)
        dtype = DTYPES[config.compute_dtype]
        self.rotary, self.rotary_key = HeadRotary(self.dim, dtype), HeadRotary(self.dim, dtype)
        self.prepend_key, self.prepend_value = ops.Concat(axis=1), ops.Concat(axis=1)
        self.repeat_key: Any = RepeatHeads(copies) if copies > 1 else None
        self.repeat_value: Any = RepeatHeads(copies) if copies > 1 else None

    def construct(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, seeds: Seeds = None, prefix: Prefix = None,
        cache: Cache = None
    ) -> Tensor:  # fmt: skip
        """x [M, H] -> [M, H]; other arguments as in `SelfAttention.construct`, but there is no cache."""
        if cache is not None:
            raise ValueError("sharded attention takes no cache")
        batch, length = ops.shape(cos)[0], ops.shape(cos)[1]
        query, key, value = self.query_key_value(x, seeds)
        query = self.rotary(self.reshape(query, (batch, length, self.heads, self.dim)), cos, sin)
        key = self.rotary_key(self.reshape(key, (batch, length, self.groups, self.dim)), cos, sin)
        value = self.reshape(value, (batch, length, self.groups, self.dim))
        if prefix is not None:
            key, value = self.prepend_key((prefix[0], key)), self.prepend_value((prefix[1], value))
        if self.repeat_key is not None:
            key, value = self.repeat_key(key), self.repeat_value(value)
        mixed = self.attention(query, key, value, bias, seeds)
        return self.dense(self.reshape(mixed, (-1, self.heads * self.dim)), seeds)


class ShardedMLP(MLP):
    """The MLP with a separate weight for each half of its first layer."""

    def construct(self, x: Tensor, seeds: Seeds = None) -> Tensor:
        """x [M, H] -> [M, H]."""
        gate, up = self.dense_h_to_4h(x, seeds)
        return self.dense_4h_to_h(self.activation.gated(gate, up), seeds)


class VocabularyParallelLoss(nn.Cell):
    """`NextTokenLoss` of operators that each card computes for its part of the vocabulary.

    log softmax takes a maximum and a sum, which are reduced over the cards; no card has all logits of a row.
    """

    def __init__(self, vocab_size: int, parallel: ParallelConfig) -> None:
        super().__init__()
        d, m = parallel.data_parallel, parallel.model_parallel
        self.vocab_size = vocab_size
        rows, cards = (d, 1), (d, m)
        self.tail = ops.StridedSlice().shard((rows,))
        self.concat = ops.Concat(axis=1).shard((rows, rows))
        self.not_equal = ops.NotEqual().shard((rows, ()))
        self.to_float, self.to_int = ops.Cast().shard((rows,)), ops.Cast().shard((rows,))
        self.mask_target = ops.Mul().shard((rows, rows))
        self.maximum = ops.ReduceMax(keep_dims=True).shard((cards,))
        self.shift = ops.Sub().shard((cards, rows))
        self.exp, self.log = ops.Exp().shard((cards,)), ops.Log().shard((rows,))
        self.sum_exp = ops.ReduceSum(keep_dims=True).shard((cards,))
        self.one_hot = ops.OneHot().shard((cards, (), ()))
        self.pick = ops.Mul().shard((cards, cards))
        self.sum_picked = ops.ReduceSum(keep_dims=True).shard((cards,))
        self.subtract, self.weigh = ops.Sub().shard((rows, rows)), ops.Mul().shard((rows, rows))
        self.total, self.count = ops.ReduceSum().shard((rows,)), ops.ReduceSum().shard((rows,))
        self.reshape = ops.Reshape()
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [M, V] with M = B * S, labels int32 [B, S] (-100 ignored) -> (sum, count), float32
        scalars."""
        batch, length = ops.shape(labels)
        last = ops.fill(ms.int32, (batch, 1), IGNORED_LABEL)
        target = self.concat((self.tail(labels, (0, 1), (batch, length), (1, 1)), last))
        real = self.not_equal(target, IGNORED_LABEL)
        target = self.reshape(self.mask_target(target, self.to_int(real, ms.int32)), (batch * length,))
        weight = self.reshape(self.to_float(real, ms.float32), (batch * length, 1))
        shifted = self.shift(logits, ops.stop_gradient(self.maximum(logits, 1)))
        log_sum = self.log(self.sum_exp(self.exp(shifted), 1))
        one_hot = self.one_hot(target, self.vocab_size, self.on, self.off)
        loss = self.subtract(log_sum, self.sum_picked(self.pick(shifted, one_hot), 1))
        return self.total(self.weigh(loss, weight)), self.count(weight)


def sharded_glm(config: GLMConfig, parallel: ParallelConfig) -> GLMNetwork:
    """A network that takes batches and gives logits of two axes, [B * S, V]; joint layers are in parts.

    Build it in semi-automatic parallel mode, in which MindSpore does not fill parameters before they are cut. Then
    attach an adapter, attach strategies (`glm_ms.parallel.strategies`), compile, and load the weights.
    """
    attention = partial(ShardedAttention, copies=kv_copies(config, parallel))
    dropout = partial(FlatDropout, width=config.hidden_size)
    return GLMNetwork(config, Cells("sharded", FlatEmbedding, attention, ShardedMLP, dropout))
