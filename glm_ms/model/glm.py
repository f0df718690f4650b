"""The GLM network of ChatGLM2 and ChatGLM3: attention, MLP, blocks, the whole.

Attribute names are chosen so that parameter names equal those of the released checkpoints, for example
`transformer.encoder.layers.0.self_attention.query_key_value.weight`.
"""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.layers import DTYPES, Embedding, Linear, build_norm
from glm_ms.model.mask import AttentionBias
from glm_ms.ops.activation import SwiGLU
from glm_ms.ops.attention import GroupedAttention
from glm_ms.ops.rotary import ApplyRotary, rotary_tables


class SelfAttention(nn.Cell):
    """Joint qkv projection, rotary embedding, grouped attention, output projection."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = (
            config.num_attention_heads,
            config.num_kv_heads,
            config.kv_channels,
        )
        self.interleaved = not config.multi_query_attention
        self.query_key_value = Linear(
            config, config.hidden_size, config.qkv_size, config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = Linear(config, config.query_size, config.hidden_size, config.add_bias_linear)
        self.rotary = ApplyRotary(config.kv_channels, DTYPES[config.compute_dtype])
        self.attention = GroupedAttention(self.heads, self.groups, self.dim, config.attention_dropout)
        self.reshape = ops.Reshape()
        self.transpose = ops.Transpose()
        self.write = ops.ScatterUpdate()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, H] -> query [B, S, N, D], key and value [B, S, G, D]; query and key turned."""
        heads, groups = self.heads, self.groups
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        qkv = self.query_key_value(x)
        if self.interleaved:  # rows are [head, (q, k, v), D]: bring them to [all q | all k | all v]
            qkv = self.transpose(self.reshape(qkv, (batch, length, heads, 3, self.dim)), (0, 1, 3, 2, 4))
        qkv = self.reshape(qkv, (batch, length, heads + 2 * groups, self.dim))
        turned = self.rotary(qkv[:, :, : heads + groups], cos, sin)
        return turned[:, :, :heads], turned[:, :, heads:], qkv[:, :, heads + groups :]

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, H], cos/sin [B, S, 1, D], bias [B, 1, S, S] -> [B, S, H]."""
        query, key, value = self.project(x, cos, sin)
        key, value = self.transpose(key, (0, 2, 1, 3)), self.transpose(value, (0, 2, 1, 3))
        return self.dense(self.attention(query, key, value, bias))

    def cached(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        rows: Tensor,
        cache: tuple[Parameter, Parameter],
    ) -> Tensor:
        """The same with a cache: writes the new keys and values, attends over all of it.

        Args:
            x: [B, S, H].
            bias: [B, 1, S, T].
            rows: int32 [B * S * G], row of the flat cache that each new key belongs to.
            cache: keys and values, each [B * G * T, D]; see glm_ms.model.cache.

        Returns:
            [B, S, H].
        """
        query, key, value = self.project(x, cos, sin)
        shape = (ops.shape(bias)[0], self.groups, -1, self.dim)
        keys = self.write(cache[0], rows, self.reshape(key, (-1, self.dim)))
        values = self.write(cache[1], rows, self.reshape(value, (-1, self.dim)))
        return self.dense(self.attention(query, self.reshape(keys, shape), self.reshape(values, shape), bias))


class MLP(nn.Cell):
    """dense_4h_to_h(SwiGLU(dense_h_to_4h(x)))."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(
            config, config.hidden_size, 2 * config.ffn_hidden_size, config.add_bias_linear
        )
        self.activation = SwiGLU()
        self.dense_4h_to_h = Linear(
            config, config.ffn_hidden_size, config.hidden_size, config.add_bias_linear
        )

    def construct(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class GLMBlock(nn.Cell):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = build_norm(config)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(p=config.hidden_dropout) if config.hidden_dropout > 0 else None
        self.add_attention = ops.Add()
        self.add_mlp = ops.Add()

    def drop(self, x: Tensor) -> Tensor:
        """Dropout in training if the config asks for it."""
        return x if self.dropout is None else self.dropout(x)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        normed = self.input_layernorm(x)
        return self.finish(x, normed, self.self_attention(normed, cos, sin, bias))

    def cached(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        rows: Tensor,
        cache: tuple[Parameter, Parameter],
    ) -> Tensor:
        """`construct` over a cache; see `SelfAttention.cached`."""
        normed = self.input_layernorm(x)
        return self.finish(x, normed, self.self_attention.cached(normed, cos, sin, bias, rows, cache))

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Residual, norm, MLP, residual."""
        x = self.add_attention(normed if self.residual_after_norm else x, self.drop(attended))
        normed = self.post_attention_layernorm(x)
        return self.add_mlp(normed if self.residual_after_norm else x, self.drop(self.mlp(normed)))


class GLMEncoder(nn.Cell):
    """The stack of blocks and the final norm. A container for names; `GLMTransformer` runs it."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.layers = nn.CellList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = build_norm(config) if config.post_layer_norm else None

    def finish(self, x: Tensor) -> Tensor:
        """Final norm, if there is one."""
        return x if self.final_layernorm is None else self.final_layernorm(x)


class GLMTransformer(nn.Cell):
    """Token ids to logits."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = GLMEncoder(config)
        self.output_layer = Linear(config, config.hidden_size, config.padded_vocab_size, has_bias=False)
        self.attention_bias = AttentionBias()
        dtype = DTYPES[config.compute_dtype]
        cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
        self.cos_table, self.sin_table = Tensor(cos, dtype), Tensor(sin, dtype)
        self.gather = ops.Gather()
        self.expand = ops.ExpandDims()

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids int32 [B, S] -> cos, sin [B, S, 1, D]."""
        cos = self.gather(self.cos_table, position_ids, 0)
        sin = self.gather(self.sin_table, position_ids, 0)
        return self.expand(cos, 2), self.expand(sin, 2)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor
    ) -> Tensor:
        """The hidden states that the output layer sees.

        Args:
            input_ids: int32 [B, S].
            attention_mask: int32 [B, S], 0 on padding.
            position_ids: int32 [B, S], below `config.seq_length`.
            slots: int32 [S], 0, 1, ..., S - 1.

        Returns:
            [B, S, H].
        """
        cos, sin = self.rotation(position_ids)
        bias = self.attention_bias(slots, slots, attention_mask, attention_mask)
        x = self.embedding(input_ids)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, bias)
        return self.encoder.finish(x)


class GLMNetwork(nn.Cell):
    """The complete network: `construct` gives logits.

    Args:
        config: architecture.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = GLMTransformer(config)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor
    ) -> Tensor:
        """As `GLMTransformer.construct`; returns logits float32 [B, S, V]."""
        hidden = self.transformer(input_ids, attention_mask, position_ids, slots)
        return ops.cast(self.transformer.output_layer(hidden), DTYPES["float32"])
