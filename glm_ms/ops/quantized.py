"""Products with weights that are stored as int8."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class QuantizedMatMul(nn.Cell):
    """x (weight * scale)^T with an int8 weight and one scale for each of its rows (output channels).

    The weight is brought to the type of x before the product: sums of products with bare int8 values would
    overflow float16. Weight and scale are frozen; only x has a gradient worth using.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dequantize = ops.Mul()
        self.matmul = ops.MatMul(transpose_b=True)
        self.expand = ops.ExpandDims()
        self.cast = ops.Cast()

    def construct(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x [M, K], weight int8 [N, K], scale [N] of any float type -> [M, N], type of x."""
        scale = self.expand(self.cast(scale, x.dtype), 1)
        return self.matmul(x, self.dequantize(self.cast(weight, x.dtype), scale))
