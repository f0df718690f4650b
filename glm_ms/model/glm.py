"""The GLM network of ChatGLM2 and ChatGLM3: attention, MLP, blocks, the whole.

Attribute names are chosen so that parameter names equal those of the released checkpoints, for example
`transformer.encoder.layers.0.self_attention.query_key_value.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Optional

from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.layers import DTYPES, Embedding, Norm, build_linear
from glm_ms.ops.portable import (
    ApplyRotary,
    AttentionBias,
    CachedAttention,
    GroupedAttention,
    SeededDropout,
    SwiGLU,
    rotary_tables,
)

# Each dropout has its own random stream: block index * DROPOUTS_PER_BLOCK + one of these.
DROPOUTS_PER_BLOCK = 3
_ATTENTION_WEIGHTS, _AFTER_ATTENTION, _AFTER_MLP = range(DROPOUTS_PER_BLOCK)
LINEARS_OF_BLOCK = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
OUTPUT_LAYER = "transformer.output_layer"
# Of dropout, int32 [B]; None: no dropout.
Seeds = Optional[Tensor]
# Keys and values [B, P, G, D] before those of the tokens; None: P is 0.
Prefix = Optional[tuple[Tensor, Tensor]]
# Tables of keys and values, [rows, D] each (`glm_ms.model.cache`); the row int32 [B * S * G] that each new key belongs
# to; blocks of rows, int32, which one after the other are all B * G * T rows (None: the whole table is); their size;
# number of the adapter of each row of x, int32 [B] (`glm_ms.peft.rows`), None: there are no adapters; number of keys up
# to that of each token, int32 [B * S], None: the blocks are None. With tables of whole pages, rows and blocks are those
# of `BlockCache`.
Cache = Optional[tuple[Parameter, Parameter, Tensor, Optional[Tensor], int, Optional[Tensor], Optional[Tensor]]]


class SelfAttention(nn.Cell):
    """Joint qkv projection, rotary embedding, grouped attention, output projection of block `index`.

    `copies` of each key/value head is for subclasses that repeat them.
    """

    def __init__(self, config: GLMConfig, index: int, linear: str = "plain", copies: int = 1) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_kv_heads, config.kv_channels
        self.interleaved = not config.multi_query_attention
        self.query_key_value = build_linear(
            linear, config, config.hidden_size, config.qkv_size, config.add_bias_linear or config.add_qkv_bias,
            config.joint_parts["self_attention.query_key_value"]
        )  # fmt: skip
        self.dense = build_linear(linear, config, config.query_size, config.hidden_size, config.add_bias_linear)
        self.rotary = ApplyRotary(config.kv_channels, DTYPES[config.compute_dtype])
        stream = index * DROPOUTS_PER_BLOCK + _ATTENTION_WEIGHTS
        self.attention = GroupedAttention(self.heads, self.groups * copies, self.dim, config.attention_dropout, stream)
        self.cached_attention = CachedAttention(self.heads, self.groups * copies, self.dim)
        self.reshape, self.transpose, self.prepend = ops.Reshape(), ops.Transpose(), ops.Concat(axis=1)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, per_row: Tensor | None = None) -> tuple[Tensor, ...]:
        """x [B, S, H] -> query [B, S, N, D], key and value [B, S, G, D]; query and key rotated. For `per_row` see
        `Linear`."""
        heads, groups = self.heads, self.groups
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        qkv = self.query_key_value(x, per_row)
        if self.interleaved:  # rows are [head, (q, k, v), D]: bring them to [all q | all k | all v]
            qkv = self.transpose(self.reshape(qkv, (batch, length, heads, 3, self.dim)), (0, 1, 3, 2, 4))
        qkv = self.reshape(qkv, (batch, length, heads + 2 * groups, self.dim))
        turned = self.rotary(qkv[:, :, : heads + groups], cos, sin)
        return turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, heads + groups :]

    def construct(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, seeds: Seeds = None, prefix: Prefix = None,
        cache: Cache = None
    ) -> Tensor:  # fmt: skip
        """x [B, S, H], cos and sin [B, S, 1, D], bias [B, 1, S, P + S], with a cache [B, 1, S, T] -> [B, S, H]."""
        per_row = seeds if cache is None else cache[5]
        query, key, value = self.project(x, cos, sin, per_row)
        if cache is not None:
            return self.dense(self.cached_attention(query, key, value, bias, cache), per_row)
        if prefix is not None:
            key, value = self.prepend((prefix[0], key)), self.prepend((prefix[1], value))
        return self.dense(self.attention(query, key, value, bias, seeds), per_row)


class MLP(nn.Cell):
    """dense_4h_to_h(SwiGLU(dense_h_to_4h(x)))."""

    def __init__(self, config: GLMConfig, linear: str = "plain") -> None:
        super().__init__()
        hidden, ffn, has_bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        parts = config.joint_parts["mlp.dense_h_to_4h"]
        self.dense_h_to_4h = build_linear(linear, config, hidden, 2 * ffn, has_bias, parts)
        self.activation = SwiGLU()
        self.dense_4h_to_h = build_linear(linear, config, ffn, hidden, has_bias)

    def construct(self, x: Tensor, per_row: Tensor | None = None) -> Tensor:
        """x [B, S, H] -> [B, S, H]. For `per_row` see `Linear`."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x, per_row)), per_row)


@dataclass(frozen=True)
class Cells:
    """The classes that a network is built of, chosen once by its builder.

    Attributes:
        linear: kind of all linear layers, a key of `LINEARS`.
        output: kind of the output layer; None: as the others.
        embedding, attention, mlp, dropout: called with (config), (config, block, kind), (config, kind), (p, stream).
    """

    linear: str = "plain"
    embedding: Callable[[GLMConfig], nn.Cell] = Embedding
    attention: Callable[[GLMConfig, int, str], nn.Cell] = SelfAttention
    mlp: Callable[[GLMConfig, str], nn.Cell] = MLP
    dropout: Callable[[float, int], nn.Cell] = SeededDropout
    output: str | None = None


class GLMBlock(nn.Cell):
    """Pre-norm block number `index`: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GLMConfig, index: int, cells: Cells) -> None:
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = Norm(config)
        self.self_attention = cells.attention(config, index, cells.linear)
        self.post_attention_layernorm = Norm(config)
        self.mlp = cells.mlp(config, cells.linear)
        self.dropouts = config.hidden_dropout > 0
        if self.dropouts:
            stream = index * DROPOUTS_PER_BLOCK
            self.drop_attention = cells.dropout(config.hidden_dropout, stream + _AFTER_ATTENTION)
            self.drop_mlp = cells.dropout(config.hidden_dropout, stream + _AFTER_MLP)
        self.add_attention, self.add_mlp = ops.Add(), ops.Add()

    def construct(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, seeds: Seeds = None, prefix: Prefix = None,
        cache: Cache = None
    ) -> Tensor:  # fmt: skip
        """As `SelfAttention.construct`. Dropout needs `hidden_dropout` and seeds."""
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, cos, sin, bias, seeds, prefix, cache)
        drop = self.dropouts and seeds is not None
        if drop:
            attended = self.drop_attention(attended, seeds)
        x = self.add_attention(normed if self.residual_after_norm else x, attended)
        normed = self.post_attention_layernorm(x)
        y = self.mlp(normed, seeds if cache is None else cache[5])
        if drop:
            y = self.drop_mlp(y, seeds)
        return self.add_mlp(normed if self.residual_after_norm else x, y)


class GLMEncoder(nn.Cell):
    """The blocks and the final norm: a level of parameter names, run by `GLMTransformer`."""

    def __init__(self, config: GLMConfig, cells: Cells) -> None:
        super().__init__()
        self.layers = nn.CellList([GLMBlock(config, index, cells) for index in range(config.num_layers)])
        self.final_layernorm = Norm(config) if config.post_layer_norm else None

    def finish(self, x: Tensor) -> Tensor:
        """Final norm, if there is one."""
        return x if self.final_layernorm is None else self.final_layernorm(x)


class GLMTransformer(nn.Cell):
    """Token ids to the input of the output layer.

    `prefix_encoder` gives for (batch size, seeds) the keys and values [B, P, G, D] of every layer before those of the
    tokens, and has P as `length`; None without one, see `glm_ms.peft`.
    """

    def __init__(self, config: GLMConfig, cells: Cells) -> None:
        super().__init__()
        self.embedding = cells.embedding(config)
        self.encoder = GLMEncoder(config, cells)
        output = cells.output or cells.linear
        self.output_layer = build_linear(output, config, config.hidden_size, config.padded_vocab_size, False)
        self.prefix_encoder: Any = None
        self.attention_bias = AttentionBias()
        self.join_slots, self.join_masks = ops.Concat(axis=0), ops.Concat(axis=1)
        dtype = DTYPES[config.compute_dtype]
        cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
        self.cos_table, self.sin_table = Tensor(cos, dtype), Tensor(sin, dtype)
        self.gather, self.expand = ops.Gather(), ops.ExpandDims()

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids int32 [B, S] -> cos, sin [B, S, 1, D]."""
        cos = self.gather(self.cos_table, position_ids, 0)
        sin = self.gather(self.sin_table, position_ids, 0)
        return self.expand(cos, 2), self.expand(sin, 2)

    def prefixed_bias(self, attention_mask: Tensor, slots: Tensor) -> Tensor:
        """The attention bias [B, 1, S, P + S] with P keys before the tokens.

        Every query sees those keys. A query that is padding sees nothing else: the reference shows it the whole row
        only without a past.
        """
        length = self.prefix_encoder.length
        ones = ops.fill(attention_mask.dtype, (ops.shape(attention_mask)[0], length), 1)
        slots = slots + length
        key_slots = self.join_slots((ops.arange(length).astype(slots.dtype), slots))
        key_mask = self.join_masks((ones, attention_mask))
        return self.attention_bias(slots, key_slots, ops.ones_like(attention_mask), key_mask)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor, seeds: Seeds = None
    ) -> Tensor:
        """Ids, mask (0 on padding), positions (below `config.seq_length`), all int32 [B, S] -> [B, S, H].

        `slots` int32 [S] is 0, 1, ..., S - 1. All dropouts of a row follow from its seed, int32 [B]; None: no dropout.
        """
        if self.prefix_encoder is None:
            bias = self.attention_bias(slots, slots, attention_mask, attention_mask)
            return self.run_blocks(input_ids, position_ids, bias, seeds)
        cos, sin = self.rotation(position_ids)
        x = self.embedding(input_ids)
        layers = self.encoder.layers
        bias = self.prefixed_bias(attention_mask, slots)
        prefix = self.prefix_encoder(ops.shape(input_ids)[0], seeds)
        for i in range(len(layers)):
            x = layers[i](x, cos, sin, bias, seeds, prefix[i])
        return self.encoder.finish(x)

    def run_blocks(self, input_ids: Tensor, position_ids: Tensor, bias: Tensor, seeds: Seeds = None) -> Tensor:
        """As `construct`, for a given attention bias [B, 1, S, S] and no prefix.

        Of packed rows ids and positions are int32 [T, 1], in place of the bias are the numbers of the rows, int32 [T],
        and seeds have their places, int32 [T, 2]; see `glm_ms.engine.step.packing`. The result is [T, 1, H].
        """
        cos, sin = self.rotation(position_ids)
        x = self.embedding(input_ids)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, bias, seeds)
        return self.encoder.finish(x)


class GLMNetwork(nn.Cell):
    """The complete network; `cells` are the classes it is built of."""

    def __init__(self, config: GLMConfig, cells: Cells | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = GLMTransformer(config, cells or Cells())
        self.cast = ops.Cast()

    def linears(self) -> dict[str, nn.Cell]:
        """Name -> every linear layer, in the order of the network."""
        found = {}
        for index, layer in enumerate(self.transformer.encoder.layers):
            for name in LINEARS_OF_BLOCK:
                found[f"transformer.encoder.layers.{index}.{name}"] = attrgetter(name)(layer)
        return {**found, OUTPUT_LAYER: self.transformer.output_layer}

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor, seeds: Seeds = None
    ) -> Tensor:
        """As `GLMTransformer.construct`; returns logits float32 [B, S, V]."""
        return self.logits(self.transformer(input_ids, attention_mask, position_ids, slots, seeds), seeds)

    def logits(self, hidden: Tensor, seeds: Seeds = None) -> Tensor:
        """Input of the output layer [B, ..., H] -> float32 [B, ..., V]."""
        return self.cast(self.transformer.output_layer(hidden, seeds), DTYPES["float32"])
