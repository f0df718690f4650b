"""`QuantizedLinear`, a linear layer with packed integer weights, and its entries in the table of linear layers."""

from __future__ import annotations

from functools import partial

from mindspore import Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.layers import DTYPES, LINEARS, Parts, new_parameter
from glm_ms.ops.quantized import Int4Product, Int8Product, QuantizedProduct
from glm_ms.quant import GROUPS, Quantization


class QuantizedLinear(nn.Cell):
    """y = x W^T + b with W of 8 or 4 bits. Its parameters are not trained; gradients flow to x and to `lora`.

    Args: as `glm_ms.model.layers.Linear`, and how W is quantized.

    Attributes:
        quantized: the product, which has the parameters `weight` (packed) and `scale`, and `bits` and `group`. Other
            programs over the same bytes, such as kernels of a CPU, read them there.
        bias: parameter [out] or None.
        in_features, out_features, dtype, lora: as `Linear`.
    """

    def __init__(
        self, config: GLMConfig, in_features: int, out_features: int, has_bias: bool, parts: Parts = None, *,
        quantization: Quantization
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, DTYPES[config.compute_dtype]
        self.quantized: QuantizedProduct = (
            Int8Product(in_features, out_features, self.dtype)
            if quantization.bits == 8
            else Int4Product(in_features, out_features, quantization.group, self.dtype)
        )
        self.bias = new_parameter((out_features,), config.param_init_type, "zeros") if has_bias else None
        self.lora: nn.Cell | None = None
        self.bias_add, self.lora_add, self.reshape = ops.Add(), ops.Add(), ops.Reshape()
        self.cast, self.cast_bias = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, per_row: Tensor | None = None) -> Tensor:
        """As `Linear.construct`."""
        shape = ops.shape(x)
        x = self.cast(x, self.dtype)
        y = self.quantized(self.reshape(x, (-1, self.in_features)))
        if self.bias is not None:
            y = self.bias_add(y, self.cast_bias(self.bias, self.dtype))
        y = self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +
        return y if self.lora is None else self.lora_add(y, self.lora(x, per_row))


for _quantization in (Quantization(8), *(Quantization(4, group) for group in GROUPS)):
    LINEARS[_quantization.kind] = partial(QuantizedLinear, quantization=_quantization)
