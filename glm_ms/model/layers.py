"""Cells that hold the parameters: linear, embedding, norms."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal, initializer

from glm_ms.model.config import GLMConfig
from glm_ms.ops.norm import LayerNormalize, RMSNormalize

# Standard deviation of random weights; the released models are always loaded, so this matters only to
# networks trained from nothing.
INIT_STD = 0.02

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def new_parameter(shape: tuple[int, ...], dtype: str, init: str | Initializer | None = None) -> Parameter:
    """A parameter of the given storage type; `init` defaults to Normal(INIT_STD)."""
    return Parameter(initializer(init or Normal(INIT_STD), shape, DTYPES[dtype]))


class Linear(nn.Cell):
    """y = x W^T + b, computed in `config.compute_dtype`. Weight [out, in], bias [out] or None.

    Attributes:
        lora: a cell whose result for (x, seeds) is added to y; None without one, see `glm_ms.peft`.
    """

    def __init__(self, config: GLMConfig, in_features: int, out_features: int, has_bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = DTYPES[config.compute_dtype]
        self.weight = new_parameter((out_features, in_features), config.param_init_type)
        self.bias = new_parameter((out_features,), config.param_init_type, "zeros") if has_bias else None
        self.lora: nn.Cell | None = None
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.Add()
        self.lora_add = ops.Add()
        self.reshape = ops.Reshape()
        self.cast = ops.Cast()
        self.cast_weight, self.cast_bias = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """x [B, ..., in], seeds of dropout int32 [B] -> [B, ..., out] of the compute type."""
        shape = ops.shape(x)
        x = self.cast(x, self.dtype)
        y = self.reshape(x, (-1, self.in_features))
        y = self.matmul(y, self.cast_weight(self.weight, self.dtype))
        if self.bias is not None:
            y = self.bias_add(y, self.cast_bias(self.bias, self.dtype))
        y = self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +
        return y if self.lora is None else self.lora_add(y, self.lora(x, seeds))


class Embedding(nn.Cell):
    """Rows of `embedding_table` [V, H] by token id."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.embedding_table = new_parameter(
            (config.padded_vocab_size, config.hidden_size), config.param_init_type
        )
        self.dtype = DTYPES[config.compute_dtype]
        self.gather = ops.Gather()
        self.cast = ops.Cast()

    def construct(self, input_ids: Tensor) -> Tensor:
        """input_ids int32 [B, S] -> [B, S, H] of the compute type."""
        return self.cast(self.gather(self.embedding_table, input_ids, 0), self.dtype)


class RMSNorm(nn.Cell):
    """RMSNorm with a learnt scale `weight` [H]."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.weight = new_parameter((config.hidden_size,), config.param_init_type, "ones")
        self.normalize = RMSNormalize(config.layernorm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.normalize(x, self.weight)


class LayerNorm(nn.Cell):
    """LayerNorm with `weight` [H] and `bias` [H]."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.weight = new_parameter((config.hidden_size,), config.param_init_type, "ones")
        self.bias = new_parameter((config.hidden_size,), config.param_init_type, "zeros")
        self.normalize = LayerNormalize(config.layernorm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.normalize(x, self.weight, self.bias)


def build_norm(config: GLMConfig) -> nn.Cell:
    """The norm the config asks for."""
    return RMSNorm(config) if config.rmsnorm else LayerNorm(config)
