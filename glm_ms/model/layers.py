"""Cells with parameters: embedding and norms."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal, initializer

from glm_ms.model.config import GLMConfig
from glm_ms.ops.norm import LayerNormalize, RMSNormalize

# Standard deviation of random weights, for networks trained from scratch.
INIT_STD = 0.02

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def new_parameter(shape: tuple[int, ...], dtype: str, init: str | Initializer | None = None) -> Parameter:
    """A parameter of the given storage type; `init` defaults to Normal(INIT_STD)."""
    return Parameter(initializer(init or Normal(INIT_STD), shape, DTYPES[dtype]))


class Embedding(nn.Cell):
    """Rows of `embedding_table` [V, H] by token id."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.embedding_table = new_parameter((config.padded_vocab_size, config.hidden_size), config.param_init_type)
        self.dtype = DTYPES[config.compute_dtype]
        self.gather, self.cast = ops.Gather(), ops.Cast()

    def construct(self, input_ids: Tensor) -> Tensor:
        """input_ids int32 [B, S] -> [B, S, H] of the compute type."""
        return self.cast(self.gather(self.embedding_table, input_ids, 0), self.dtype)


class RMSNorm(nn.Cell):
    """RMSNorm with a trained scale `weight` [H]."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.weight = new_parameter((config.hidden_size,), config.param_init_type, "ones")
        self.normalize = RMSNormalize(config.layernorm_epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.normalize(x, self.weight)


class LayerNorm(nn.Cell):
    """LayerNorm with trained `weight` [H] and `bias` [H]."""

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
