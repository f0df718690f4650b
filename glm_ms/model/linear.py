"""The linear layers of a network: one table of classes, one function that builds every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Optional

from mindspore import Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.layers import DTYPES, new_parameter

# Part -> rows, of a layer that is several projections in one; None for other layers.
Parts = Optional[Mapping[str, int]]


class Linear(nn.Cell):
    """y = x W^T + b, computed in `config.compute_dtype`. Weight [out, in], bias [out] or None.

    Every class of `LINEARS` takes these arguments and has these attributes.

    Args:
        config: storage type and compute type.
        in_features, out_features: widths.
        has_bias: adds a bias.
        parts: of a joint layer; this class has one weight for all of them.

    Attributes:
        in_features, out_features: widths.
        dtype: compute type.
        lora: a cell whose result for (x, seeds) is added to y; None without one, see `glm_ms.peft`.
    """

    def __init__(
        self, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = DTYPES[config.compute_dtype]
        self.weight = new_parameter((out_features, in_features), config.param_init_type)
        self.bias = new_parameter((out_features,), config.param_init_type, "zeros") if has_bias else None
        self.lora: nn.Cell | None = None
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add, self.lora_add = ops.Add(), ops.Add()
        self.reshape = ops.Reshape()
        self.cast, self.cast_weight, self.cast_bias = ops.Cast(), ops.Cast(), ops.Cast()

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


# Kind -> class. `glm_ms.parallel.layers` adds "sharded".
LINEARS: dict[str, Callable[..., nn.Cell]] = {"plain": Linear}


def build_linear(
    kind: str, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts = None
) -> nn.Cell:
    """Builds any linear layer of a network; for the arguments see `Linear`. Raises ValueError for an unknown kind."""
    if kind not in LINEARS:
        raise ValueError(f"linear layers of kind {kind!r}: unknown; use one of {', '.join(LINEARS)}")
    return LINEARS[kind](config, in_features, out_features, has_bias, parts)
