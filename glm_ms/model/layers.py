"""Cells with parameters: embedding, norms, linear layers with their table of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Optional

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal, initializer

from glm_ms.model.config import GLMConfig
from glm_ms.ops.portable import LayerNormalize, RMSNormalize
from glm_ms.ops.registry import device, step_kernel

# Standard deviation of random weights, for networks trained from scratch.
INIT_STD = 0.02

# Part -> rows, of a linear layer that is several projections in one; None for other layers.
Parts = Optional[Mapping[str, int]]

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def new_parameter(shape: tuple[int, ...], dtype: str, init: str | Initializer | None = None) -> Parameter:
    """A parameter of the given storage type; `init` defaults to Normal(INIT_STD)."""
    return Parameter(initializer(init or Normal(INIT_STD), shape, DTYPES[dtype]))


class Embedding(nn.Cell):
    """Rows of `embedding_table` [V, H] by token id. Its type is that of the config, but float32 for bfloat16 on a CPU
    without the C++ kernels, where nothing gathers bfloat16."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        stored, gather = config.param_init_type, ops.Gather
        if stored == "bfloat16" and device() == "CPU":
            kernel = step_kernel("bfloat16 rows")
            stored, gather = ("float32", gather) if kernel is None else (stored, kernel)
        self.embedding_table = new_parameter((config.padded_vocab_size, config.hidden_size), stored)
        self.dtype = DTYPES[config.compute_dtype]
        self.gather, self.cast = gather(), ops.Cast()

    def construct(self, input_ids: Tensor) -> Tensor:
        """input_ids int32 [B, S] -> [B, S, H] of the compute type."""
        return self.cast(self.gather(self.embedding_table, input_ids, 0), self.dtype)


class Norm(nn.Cell):
    """RMSNorm with a trained `weight` [H], or LayerNorm with a `bias` [H] too."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        width, dtype, eps = (config.hidden_size,), config.param_init_type, config.layernorm_epsilon
        self.weight = new_parameter(width, dtype, "ones")
        self.bias = None if config.rmsnorm else new_parameter(width, dtype, "zeros")
        self.normalize = RMSNormalize(eps) if config.rmsnorm else LayerNormalize(eps)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.normalize(x, self.weight) if self.bias is None else self.normalize(x, self.weight, self.bias)


class Linear(nn.Cell):
    """y = x W^T + b, computed in `config.compute_dtype`. Weight [out, in], bias [out] or None.

    Every class of `LINEARS` takes these arguments and has the attributes `in_features`, `out_features`, `dtype` and
    `lora`: a cell whose result for (x, per_row) is added to y; None without one, see `glm_ms.peft`. This class has one
    weight for all `parts` of a joint layer.
    """

    def __init__(
        self, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, DTYPES[config.compute_dtype]
        self.weight = new_parameter((out_features, in_features), config.param_init_type)
        self.bias = new_parameter((out_features,), config.param_init_type, "zeros") if has_bias else None
        self.lora: nn.Cell | None = None
        self.matmul, self.reshape = ops.MatMul(transpose_b=True), ops.Reshape()
        self.bias_add, self.lora_add = ops.Add(), ops.Add()
        self.cast, self.cast_weight, self.cast_bias = ops.Cast(), ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, per_row: Tensor | None = None) -> Tensor:
        """x [B, ..., in] -> [B, ..., out] of the compute type. What `lora` has to know of each row is int32 [B]: seeds
        of dropout in training, numbers of adapters in a server."""
        shape = ops.shape(x)
        x = self.cast(x, self.dtype)
        y = self.reshape(x, (-1, self.in_features))
        y = self.matmul(y, self.cast_weight(self.weight, self.dtype))
        if self.bias is not None:
            y = self.bias_add(y, self.cast_bias(self.bias, self.dtype))
        y = self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +
        return y if self.lora is None else self.lora_add(y, self.lora(x, per_row))


# Kind -> class. `glm_ms.parallel.layers` adds "sharded".
LINEARS: dict[str, Callable[..., nn.Cell]] = {"plain": Linear}


def build_linear(
    kind: str, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts = None
) -> nn.Cell:
    """Builds any linear layer of a network; for the arguments see `Linear`. Raises ValueError for an unknown kind."""
    if kind not in LINEARS:
        raise ValueError(f"linear layers of kind {kind!r}: unknown; use one of {', '.join(LINEARS)}")
    return LINEARS[kind](config, in_features, out_features, has_bias, parts)
