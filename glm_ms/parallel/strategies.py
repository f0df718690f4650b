"""Strategies of every operator of a network: how many ways each axis of each of its inputs is split.

Written for cells whose hidden states have two axes, [M, H], see `glm_ms.parallel.layers`. In the comments d stands for
the data-parallel ways, m for the model-parallel ones, r for those of the rows between two layers.
"""

from __future__ import annotations

from mindspore import nn

from glm_ms.model.glm import GLMBlock
from glm_ms.model.layers import Embedding, Linear, RMSNorm
from glm_ms.model.mask import AttentionBias
from glm_ms.ops.attention import GroupedAttention
from glm_ms.ops.dropout import SeededDropout
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import (
    FlatRows,
    HeadRotary,
    PartedLinear,
    RepeatHeads,
    ShardedAttention,
    ShardedMLP,
)


class Strategies:
    """Attaches strategies to cells.

    Args:
        parallel: how the work is split.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self.d, self.m, self.r = parallel.data_parallel, parallel.model_parallel, parallel.row_split
        self.parallel = parallel

    def embedding(self, cell: Embedding) -> None:
        """Copied to all cards, or split by rows: then a card adds nothing for ids that are not its own."""
        rows = 1 if self.parallel.vocab_emb_dp else self.m
        cell.gather.shard(((rows, 1), (self.d, 1)))
        cell.cast.shard(((self.d, 1, 1),))

    def rows(self, cell: nn.Cell) -> None:
        """A norm over [M, H]: rows are independent."""
        r, norm = self.r, cell.normalize
        norm.cast.shard(((r, 1),))
        norm.cast_weight.shard(((1,),))
        if not isinstance(cell, RMSNorm):
            norm.normalize.shard(((r, 1), (1,), (1,)))
            return
        norm.square.shard(((r, 1),))
        norm.mean.shard(((r, 1),))
        norm.add.shard(((r, 1), ()))
        norm.rsqrt.shard(((r, 1),))
        norm.scale.shard(((r, 1), (r, 1)))
        norm.weigh.shard(((r, 1), (1,)))

    def by_columns(self, linear: Linear, ways: int | None = None) -> None:
        """[M, in] -> [M, out] with the outputs split `ways` ways, m if not said."""
        ways = self.m if ways is None else ways
        self._linear(linear, self.d, 1, ways, ((self.d, ways),))
        if linear.lora is not None:
            self.low_rank(linear.lora, 1)

    def by_rows(self, linear: Linear) -> None:
        """[M, in] -> [M, out] with the inputs split m ways; the sum leaves whole rows, or r parts of them."""
        self._linear(linear, self.d, self.m, 1, ((self.r, 1),))
        if linear.lora is not None:
            self.low_rank(linear.lora, self.m)

    def _linear(
        self, linear: Linear, rows: int, inputs: int, outputs: int, result: tuple[tuple[int, int]]
    ) -> None:
        linear.cast.shard(((rows, inputs),))
        linear.cast_weight.shard(((outputs, inputs),))
        linear.cast_bias.shard(((outputs,),))
        scattered = result if inputs > 1 and result[0][0] != rows else None
        linear.matmul.shard(((rows, inputs), (outputs, inputs)), scattered)
        rows, outputs = result[0]
        linear.bias_add.shard(((rows, outputs), (outputs,)))
        linear.lora_add.shard(((rows, outputs), (rows, outputs)))

    def parted(self, cell: PartedLinear, ways: tuple[int, ...]) -> None:
        """The parts of a joint layer, the outputs of part i split `ways[i]` ways."""
        for i, linear in enumerate(cell.layers()):
            self.by_columns(linear, ways[i])
            cell.slices[i].shard(((self.d, 1),))
            cell.adds[i].shard(((self.d, ways[i]), (self.d, ways[i])))
        if cell.lora is not None:
            self.low_rank(cell.lora, 1)

    def low_rank(self, flat: FlatRows, inputs: int) -> None:
        """A LoRA update: A is split like the inputs of the layer, B is whole."""
        update, d = flat.cell, self.d
        if update.dropout is not None:
            self.dropout(update.dropout, 3, (d, 1, inputs))
        update.cast_down.shard(((1, inputs),))
        update.cast_up.shard(((1, 1),))
        update.down.shard(((d, inputs), (1, inputs)))
        update.up.shard(((d, 1), (1, 1)))
        update.scale.shard(((d, 1), ()))

    def dropout(self, cell: SeededDropout, axes: int, split: tuple[int, ...]) -> None:
        """The mask is computed whole by the cards of a model-parallel group: a hash of each place."""
        one = (self.d,) + (1,) * (axes - 1)
        for scalar in (cell.add_stream, cell.mul, cell.bits, cell.shift, cell.keep):
            scalar.shard((one, ()))
        cell.add_place.shard((one, (1,) * axes))
        cell.xor.shard((one, one))
        cell.cast.shard((one,))
        cell.apply.shard((split, split))
        cell.rescale.shard((split, ()))

    def rotary(self, cell: HeadRotary, ways: int) -> None:
        """Heads split `ways` ways; cos and sin are the same for all heads."""
        heads = (self.d, 1, ways, 1)
        cell.turn.shard((heads, (1, 1, 1, 1)))
        for product in (cell.mul_cos, cell.mul_sin):
            product.shard((heads, (self.d, 1, 1, 1)))
        cell.add.shard((heads, heads))

    def repeat(self, cell: RepeatHeads) -> None:
        """Whole heads go in; what follows takes its own."""
        cell.tile.shard(((self.d, 1, 1, 1, 1),))

    def attention(self, cell: GroupedAttention) -> None:
        """Every card has its own heads."""
        scores = (self.d, self.m, 1, 1)
        cell.multiply.shard(((self.d, 1, self.m, 1), ()))
        cell.split_heads.shard(((self.d, 1, self.m, 1),))
        for product in (cell.scores, cell.mix):
            product.shard((scores, scores))
        cell.cast.shard((scores,))
        cell.add_bias.shard((scores, (self.d, 1, 1, 1)))
        cell.softmax.shard((scores,))
        cell.merge_heads.shard((scores,))
        if cell.dropout is not None:
            self.dropout(cell.dropout, 4, scores)

    def self_attention(self, cell: ShardedAttention) -> None:
        """Projections by columns, heads apart, output projection by rows."""
        own = (
            self.m if cell.groups % self.m == 0 else 1
        )  # fewer heads than cards are projected by all of them
        self.parted(cell.query_key_value, (self.m, own, own))
        self.rotary(cell.rotary, self.m)
        self.rotary(cell.rotary_key, own)
        for join in (cell.prepend_key, cell.prepend_value):
            join.shard(((self.d, 1, own, 1), (self.d, 1, own, 1)))
        for repeat in (cell.repeat_key, cell.repeat_value):
            if repeat is not None:
                self.repeat(repeat)
        for transpose in (cell.split_key, cell.split_value):
            transpose.shard(((self.d, 1, self.m, 1),))
        self.attention(cell.attention)
        self.by_rows(cell.dense)

    def mlp(self, cell: ShardedMLP) -> None:
        """First layer by columns, second by rows."""
        channels = (self.d, self.m)
        self.parted(cell.dense_h_to_4h, (self.m, self.m))
        cell.activation.sigmoid.shard((channels,))
        cell.activation.gate.shard((channels, channels))
        cell.activation.mul.shard((channels, channels))
        self.by_rows(cell.dense_4h_to_h)

    def block(self, cell: GLMBlock) -> None:
        """A whole block."""
        rows = (self.r, 1)
        self.rows(cell.input_layernorm)
        self.self_attention(cell.self_attention)
        self.rows(cell.post_attention_layernorm)
        self.mlp(cell.mlp)
        cell.add_attention.shard((rows, rows))
        cell.add_mlp.shard((rows, rows))
        if cell.dropouts:
            for flat in (cell.drop_attention, cell.drop_mlp):
                self.dropout(flat.cell, 3, (self.d, 1, 1))

    def prefix(self, cell: nn.Cell) -> None:
        """A P-Tuning prefix: small, so every card forms all of it, for its own rows of the batch."""
        whole, d = (1, 1), self.d
        cell.multiply.shard((whole, whole))
        cell.add.shard((whole, (1,)))
        cell.tanh.shard((whole,))
        cell.cast.shard((whole,))
        cell.tile.shard(((1,) * 5,))
        cell.split.shard(((d, 1, 1, 1, 1),))
        if cell.dropout is not None:
            self.dropout(cell.dropout, 5, (d, 1, 1, 1, 1))

    def bias(self, cell: AttentionBias) -> None:
        """The mask of a batch; slots are constants."""
        d = self.d
        cell.expand_slots.shard(((1,),))
        cell.later.shard(((1, 1), (1, 1)))
        cell.is_padding.shard(((d, 1), ()))
        cell.is_real.shard(((d, 1), ()))
        cell.expand_mask.shard(((d, 1),))
        cell.expand_heads.shard(((d, 1, 1),))
        cell.either.shard(((1, 1), (d, 1, 1, 1)))
        cell.both.shard(((d, 1, 1, 1), (d, 1, 1, 1)))
        cell.cast.shard(((d, 1, 1, 1),))
        cell.multiply.shard(((d, 1, 1, 1), ()))
