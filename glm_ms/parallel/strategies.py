"""Strategies of every operator of a network: how many ways each axis of each of its inputs is split.

Written for cells whose hidden states have two axes, [M, H], see `glm_ms.parallel.layers`. In comments d are
the data-parallel ways, m the model-parallel ways, r the ways of the rows between two layers.
"""

from __future__ import annotations

from mindspore import nn

from glm_ms.model.glm import MLP, GLMBlock, GLMNetwork
from glm_ms.model.layers import Embedding, Linear, Norm
from glm_ms.ops.portable import AttentionBias, GroupedAttention, RMSNormalize, SeededDropout
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import HeadRotary, PartedLinear, ShardedAttention


def attach_strategies(network: GLMNetwork, parallel: ParallelConfig) -> None:
    """Gives every operator of a network its strategy, and its cells a pipeline stage.

    The network is that of `sharded_glm` for the same split, not compiled yet, with its adapter if it has one.
    """
    _Strategies(parallel).network(network)
    if parallel.pipeline_stages == 1:
        return
    glm, last = network.transformer, parallel.pipeline_stages - 1
    glm.embedding.pipeline_stage = 0
    for index, layer in enumerate(glm.encoder.layers):
        layer.pipeline_stage = parallel.stage_of(index, len(glm.encoder.layers))
    if glm.encoder.final_layernorm is not None:
        glm.encoder.final_layernorm.pipeline_stage = last
    glm.output_layer.pipeline_stage = last


def _shard(cell: nn.Cell, **strategies: tuple) -> None:
    """Gives the operators of a cell, by name, their strategies."""
    for name, strategy in strategies.items():
        getattr(cell, name).shard(strategy)


class _Strategies:
    def __init__(self, parallel: ParallelConfig) -> None:
        self.d, self.m, self.r = parallel.data_parallel, parallel.model_parallel, parallel.row_split
        self.embedding_ways = 1 if parallel.vocab_emb_dp else self.m

    def network(self, network: GLMNetwork) -> None:
        glm, d = network.transformer, self.d
        self.embedding(glm.embedding)
        self.bias(glm.attention_bias)
        _shard(glm, gather=((1, 1), (d, 1)), expand=((d, 1, 1),), join_slots=((1,), (1,)),
               join_masks=((d, 1), (d, 1)))  # fmt: skip
        if glm.prefix_encoder is not None:
            self.prefix(glm.prefix_encoder)
        for layer in glm.encoder.layers:
            self.block(layer)
        if glm.encoder.final_layernorm is not None:
            self.norm(glm.encoder.final_layernorm)
        self.by_columns(glm.output_layer, self.m)
        _shard(network, cast=((d, self.m),))

    def embedding(self, cell: Embedding) -> None:
        """Copied to all cards, or split by rows: then a card adds nothing for ids that are not its own."""
        _shard(cell, gather=((self.embedding_ways, 1), (self.d, 1)), cast=((self.d, 1, 1),))

    def bias(self, cell: AttentionBias) -> None:
        """The mask of a batch; slots are constants."""
        mask, pairs = (self.d, 1), (self.d, 1, 1, 1)
        _shard(
            cell, expand_slots=((1,),), later=((1, 1), (1, 1)), is_padding=(mask, ()), is_real=(mask, ()),
            expand_mask=(mask,), expand_heads=((self.d, 1, 1),), either=((1, 1), pairs), both=(pairs, pairs),
            cast=(pairs,), multiply=(pairs, ())
        )  # fmt: skip

    def prefix(self, cell: nn.Cell) -> None:
        """A P-Tuning prefix: small, so every card forms all of it, for its own rows of the batch."""
        whole, rows = (1, 1), (self.d, 1, 1, 1, 1)
        _shard(cell, multiply=(whole, whole), add=(whole, (1,)), tanh=(whole,), cast=(whole,), tile=((1,) * 5,),
               split=(rows,))  # fmt: skip
        if cell.dropout is not None:
            self.dropout(cell.dropout, 5, rows)

    def block(self, cell: GLMBlock) -> None:
        rows = (self.r, 1)
        self.norm(cell.input_layernorm)
        self.self_attention(cell.self_attention)
        self.norm(cell.post_attention_layernorm)
        self.mlp(cell.mlp)
        _shard(cell, add_attention=(rows, rows), add_mlp=(rows, rows))
        if cell.dropouts:
            for flat in (cell.drop_attention, cell.drop_mlp):
                self.dropout(flat.drop, 3, (self.d, 1, 1))

    def norm(self, cell: Norm) -> None:
        """A norm over [M, H]: rows are independent."""
        rows, width = (self.r, 1), (1,)
        _shard(cell.normalize, cast=(rows,), cast_weight=(width,))
        if isinstance(cell.normalize, RMSNormalize):
            _shard(cell.normalize, square=(rows,), mean=(rows,), add=(rows, ()), rsqrt=(rows,), scale=(rows, rows),
                   weigh=(rows, width))  # fmt: skip
        else:
            _shard(cell.normalize, normalize=(rows, width, width))

    def self_attention(self, cell: ShardedAttention) -> None:
        """Projections by columns, each card its own heads, output projection by rows."""
        # If there are fewer key/value heads than cards, every card projects all of them.
        own = self.m if cell.groups % self.m == 0 else 1
        keys = (self.d, 1, own, 1)
        self.parted(cell.query_key_value, (self.m, own, own))
        self.rotary(cell.rotary, self.m)
        self.rotary(cell.rotary_key, own)
        _shard(cell, prepend_key=(keys, keys), prepend_value=(keys, keys))
        for repeat in (cell.repeat_key, cell.repeat_value):
            if repeat is not None:  # whole heads go in; what follows takes its own
                _shard(repeat, tile=((self.d, 1, 1, 1, 1),))
        self.attention(cell.attention)
        self.by_rows(cell.dense)

    def rotary(self, cell: HeadRotary, ways: int) -> None:
        """Heads split `ways` ways; cos and sin are the same for all heads."""
        heads, table = (self.d, 1, ways, 1), (self.d, 1, 1, 1)
        _shard(cell, turn=(heads, (1, 1, 1, 1)), mul_cos=(heads, table), mul_sin=(heads, table), add=(heads, heads))

    def attention(self, cell: GroupedAttention) -> None:
        heads, scores = (self.d, 1, self.m, 1), (self.d, self.m, 1, 1)
        _shard(
            cell, split_key=(heads,), split_value=(heads,), multiply=(heads, ()), split_heads=(heads,),
            scores=(scores, scores), mix=(scores, scores), cast=(scores,), add_bias=(scores, (self.d, 1, 1, 1)),
            softmax=(scores,), merge_heads=(scores,)
        )  # fmt: skip
        if cell.dropout is not None:
            self.dropout(cell.dropout, 4, scores)

    def mlp(self, cell: MLP) -> None:
        """First layer by columns, second by rows."""
        channels = (self.d, self.m)
        self.parted(cell.dense_h_to_4h, (self.m, self.m))
        _shard(cell.activation, sigmoid=(channels,), gate=(channels, channels), mul=(channels, channels))
        self.by_rows(cell.dense_4h_to_h)

    def parted(self, cell: PartedLinear, ways: tuple[int, ...]) -> None:
        """A joint layer, the outputs of part i split `ways[i]` ways."""
        for i, linear in enumerate(cell.parts):
            self.by_columns(linear, ways[i])
            cell.slices[i].shard(((self.d, 1),))
            cell.adds[i].shard(((self.d, ways[i]), (self.d, ways[i])))
        self.low_rank(cell.lora, 1)

    def by_columns(self, linear: Linear, ways: int) -> None:
        """[M, in] -> [M, out] with the outputs split."""
        linear.matmul.shard(((self.d, 1), (ways, 1)))
        self.around(linear, 1, ways, (self.d, ways))

    def by_rows(self, linear: Linear) -> None:
        """[M, in] -> [M, out] with the inputs split m ways; the sum leaves whole rows, or r parts of them."""
        result = (self.r, 1)
        scattered = (result,) if self.m > 1 and self.r != self.d else None
        linear.matmul.shard(((self.d, self.m), (1, self.m)), scattered)
        self.around(linear, self.m, 1, result)

    def around(self, linear: Linear, inputs: int, outputs: int, result: tuple[int, int]) -> None:
        """What a linear layer does beside its product."""
        _shard(
            linear, cast=((self.d, inputs),), cast_weight=((outputs, inputs),), cast_bias=((outputs,),),
            bias_add=(result, result[1:]), lora_add=(result, result)
        )  # fmt: skip
        self.low_rank(linear.lora, inputs)

    def low_rank(self, update: nn.Cell | None, inputs: int) -> None:
        """A LoRA update, if there is one: A is split like the inputs of the layer, B is whole."""
        if update is None:
            return
        d = self.d
        _shard(update, cast_down=((1, inputs),), cast_up=((1, 1),), down=((d, inputs), (1, inputs)),
               up=((d, 1), (1, 1)), scale=((d, 1), ()))  # fmt: skip
        if update.dropout is not None:
            self.dropout(update.dropout, 3, (d, 1, inputs))

    def dropout(self, cell: SeededDropout, axes: int, split: tuple[int, ...]) -> None:
        """The cards of a model-parallel group each compute the whole mask: it is a hash of each place."""
        one = (self.d,) + (1,) * (axes - 1)
        for scalar in ("add_stream", "mul", "bits", "shift", "keep"):
            getattr(cell, scalar).shard((one, ()))
        _shard(cell, add_place=(one, (1,) * axes), xor=(one, one), cast=(one,), apply=(split, split),
               rescale=(split, ()))  # fmt: skip
