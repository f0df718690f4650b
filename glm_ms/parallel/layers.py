"""Cells that take the place of a network's own where a weight is split over cards.

Between two layers hidden states have two axes, [M, H] with M = B * S, so that their rows can be split over all cards
of a stage, whatever the batch.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import MLP, SelfAttention
from glm_ms.model.layers import DTYPES, Embedding, Linear
from glm_ms.ops.rotary import pair_rotation
from glm_ms.parallel.config import ParallelConfig, kv_copies


class FlatEmbedding(Embedding):
    """An embedding that gives rows without a batch axis."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.width = config.hidden_size
        self.reshape = ops.Reshape()

    def construct(self, input_ids: Tensor) -> Tensor:
        """input_ids int32 [B, S] -> [M, H] of the compute type."""
        x = self.cast(self.gather(self.embedding_table, input_ids, 0), self.dtype)
        return self.reshape(x, (-1, self.width))


class FlatRows(nn.Cell):
    """Gives the cell it holds, which needs the batch axis for its dropout, rows with one.

    Args:
        cell: maps (x [B, S, C], seeds [B]) to [B, S, C'].
        width: C'.
    """

    def __init__(self, cell: nn.Cell, width: int) -> None:
        super().__init__(auto_prefix=False)
        self.cell, self.width = cell, width
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """x [M, C], seeds int32 [B] or None -> [M, C']."""
        if seeds is not None:
            x = self.reshape(x, (ops.shape(seeds)[0], -1, ops.shape(x)[-1]))
        return self.reshape(self.cell(x, seeds), (-1, self.width))


class PartedLinear(nn.Cell):
    """A linear layer whose output rows are several parameters, so that each can be split evenly over the cards.

    A joint weight [q | k | v] cut into equal pieces would give no card whole heads of its own.

    Args:
        config: architecture.
        in_features: inputs.
        parts: name -> output rows, in the order of the joint weight.
        has_bias: each part has a bias.
    """

    def __init__(self, config: GLMConfig, in_features: int, parts: dict[str, int], has_bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(parts.values())
        self.sizes = tuple(parts.values())
        self.names = tuple(parts)
        for name, rows in parts.items():
            setattr(self, name, Linear(config, in_features, rows, has_bias))
        self.lora: nn.Cell | None = None
        self.slices = [ops.StridedSlice() for _ in parts]
        self.adds = [ops.Add() for _ in parts]

    def layers(self) -> list[Linear]:
        """The parts in order."""
        return [getattr(self, name) for name in self.names]

    def updated(self, results: tuple[Tensor, ...], x: Tensor, seeds: Tensor | None) -> tuple[Tensor, ...]:
        """Adds to each part its rows of the low-rank update, which is computed for all of them."""
        if self.lora is None:
            return results
        update = self.lora(x, seeds)
        rows, begin = ops.shape(update)[0], 0
        updated = ()
        for i in range(len(self.sizes)):
            end = begin + self.sizes[i]
            part = self.slices[i](update, (0, begin), (rows, end), (1, 1))
            updated += (self.adds[i](results[i], part),)
            begin = end
        return updated


class QueryKeyValue(PartedLinear):
    """The joint projection in three parts."""

    def construct(self, x: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, ...]:
        """x [M, H] -> query [M, N * D], key and value [M, G * D]."""
        return self.updated((self.query(x), self.key(x), self.value(x)), x, seeds)


class GateUp(PartedLinear):
    """The first layer of the MLP in two parts."""

    def construct(self, x: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, ...]:
        """x [M, H] -> gate and up [M, F]."""
        return self.updated((self.gate(x), self.up(x)), x, seeds)


class HeadRotary(nn.Cell):
    """`ApplyRotary` for heads that are split over cards: the same product, with the head axis kept."""

    def __init__(self, head_dim: int, dtype: ms.Type) -> None:
        super().__init__()
        self.rotation = Tensor(pair_rotation(head_dim)[None, None], dtype)
        self.turn = ops.BatchMatMul()
        self.mul_cos = ops.Mul()
        self.mul_sin = ops.Mul()
        self.add = ops.Add()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D] -> [B, S, N, D]."""
        return self.add(self.mul_cos(x, cos), self.mul_sin(self.turn(x, self.rotation), sin))


class RepeatHeads(nn.Cell):
    """Repeats every key/value head, so that each card of the model-parallel group has one.

    Args:
        copies: of each head.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.tile = ops.Tile()
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor) -> Tensor:
        """x [B, T, G, D] -> [B, T, G * copies, D]; head g becomes heads g * copies and following."""
        batch, length, groups, dim = ops.shape(x)
        x = self.tile(self.reshape(x, (batch, length, groups, 1, dim)), (1, 1, 1, self.copies, 1))
        return self.reshape(x, (batch, length, groups * self.copies, dim))


class ShardedAttention(SelfAttention):
    """Attention with projections of their own for query, key and value, over rows without a batch axis.

    Args:
        config: architecture, with grouped queries.
        index: of the block.
        parallel: how heads are split.
    """

    def __init__(self, config: GLMConfig, index: int, parallel: ParallelConfig) -> None:
        super().__init__(config, index)
        copies = kv_copies(config, parallel)
        has_bias = config.add_bias_linear or config.add_qkv_bias
        parts = config.joint_parts["self_attention.query_key_value"]
        self.query_key_value = QueryKeyValue(config, config.hidden_size, parts, has_bias)
        dtype = DTYPES[config.compute_dtype]
        self.rotary, self.rotary_key = HeadRotary(self.dim, dtype), HeadRotary(self.dim, dtype)
        self.split_key, self.split_value = ops.Transpose(), ops.Transpose()
        self.prepend_key, self.prepend_value = ops.Concat(axis=1), ops.Concat(axis=1)
        self.repeat_key = RepeatHeads(copies) if copies > 1 else None
        self.repeat_value = RepeatHeads(copies) if copies > 1 else None
        self.attention.num_groups = self.groups * copies
        self.attention.per_group = self.heads // self.attention.num_groups

    def construct(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        seeds: Tensor | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [M, H] -> [M, H]; the other arguments as in `SelfAttention.construct`."""
        batch, length = ops.shape(cos)[0], ops.shape(cos)[1]
        query, key, value = self.query_key_value(x, seeds)
        query = self.rotary(self.reshape(query, (batch, length, self.heads, self.dim)), cos, sin)
        key = self.rotary_key(self.reshape(key, (batch, length, self.groups, self.dim)), cos, sin)
        value = self.reshape(value, (batch, length, self.groups, self.dim))
        if prefix is not None:
            key, value = self.prepend_key((prefix[0], key)), self.prepend_value((prefix[1], value))
        if self.repeat_key is not None:
            key, value = self.repeat_key(key), self.repeat_value(value)
        key, value = self.split_key(key, (0, 2, 1, 3)), self.split_value(value, (0, 2, 1, 3))
        mixed = self.attention(query, key, value, bias, seeds)
        return self.dense(self.reshape(mixed, (-1, self.heads * self.dim)), seeds)


class ShardedMLP(MLP):
    """The MLP with weights of their own for both halves of its first layer."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        parts = config.joint_parts["mlp.dense_h_to_4h"]
        self.dense_h_to_4h = GateUp(config, config.hidden_size, parts, config.add_bias_linear)

    def construct(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """x [M, H] -> [M, H]."""
        gate, up = self.dense_h_to_4h(x, seeds)
        return self.dense_4h_to_h(self.activation.gated(gate, up), seeds)
