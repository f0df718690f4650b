"""Products with packed integer weights: the portable cells, which define the results.

They unpack the weight, multiply it by its scales in float32, and multiply x by the rounded result: exact but slow. The
bytes are those of `glm_ms.ops.packing`. These cells own their parameters, so that a fused kernel which needs another
layout can repack them when it replaces the cell.
"""

from __future__ import annotations

from typing import ClassVar

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from glm_ms.ops.packing import PANEL, Packed

Shape = tuple[int, ...]
_TYPES = {"int8": ms.int8, "uint8": ms.uint8, "float32": ms.float32, "float16": ms.float16}


def packed_shapes(rows: int, width: int, bits: int, group: int) -> tuple[tuple[Shape, str], tuple[Shape, str]]:
    """Shape and type of the packed weight and of its scales, of a weight [rows, width]; see `glm_ms.ops.packing`."""
    panels = -(-rows // PANEL)
    if bits == 8:
        return ((panels, -(-width // 4), PANEL, 4), "int8"), ((rows,), "float32")
    groups = -(-width // group)
    return ((panels, groups * group // 8, PANEL, 4), "uint8"), ((panels, groups, PANEL), "float16")


class QuantizedProduct(nn.Cell):
    """y = x W^T for a packed weight W [out, in]. Gradients flow to x only.

    Attributes:
        bits, group: as of `glm_ms.quant.Quantization`.
        in_features, out_features: sizes of W.
        weight: packed integers, int8 or uint8.
        scale: float32 or float16.
        dtype: type of the product.
    """

    bits: ClassVar[int]

    def __init__(self, in_features: int, out_features: int, group: int, dtype: ms.Type) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group, self.dtype = in_features, out_features, group, dtype
        (weight, integers), (scale, floats) = packed_shapes(out_features, in_features, self.bits, group)
        self.weight = Parameter(initializer("zeros", weight, _TYPES[integers]), requires_grad=False)
        self.scale = Parameter(initializer("zeros", scale, _TYPES[floats]), requires_grad=False)
        self.matmul, self.cast, self.cast_weight = ops.MatMul(transpose_b=True), ops.Cast(), ops.Cast()
        self.unpack, self.order, self.reshape, self.scale_up = ops.Cast(), ops.Transpose(), ops.Reshape(), ops.Mul()

    def packed(self) -> Packed:
        """The arrays of the parameters."""
        shape = self.out_features, self.in_features
        return Packed(self.weight.asnumpy(), self.scale.asnumpy(), shape, self.group)

    def matrix(self) -> Tensor:
        """W, float32 [out, in]."""
        raise NotImplementedError

    def construct(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out] of the type `dtype`."""
        weight = ops.stop_gradient(self.cast_weight(self.matrix(), self.dtype))
        return self.matmul(self.cast(x, self.dtype), weight)


class Int8Product(QuantizedProduct):
    """8 bits, a float32 scale for each output."""

    bits = 8

    def __init__(self, in_features: int, out_features: int, dtype: ms.Type) -> None:
        super().__init__(in_features, out_features, 0, dtype)
        panels, quads = self.weight.shape[:2]
        self.padded = panels * PANEL, quads * 4

    def matrix(self) -> Tensor:
        """W, float32 [out, in]."""
        q = self.order(self.unpack(self.weight, ms.float32), (0, 2, 1, 3))
        q = self.reshape(q, self.padded)[: self.out_features, : self.in_features]
        return self.scale_up(q, self.reshape(self.scale, (-1, 1)))


class Int4Product(QuantizedProduct):
    """4 bits, a float16 scale for each `group` inputs of an output."""

    bits = 4

    def __init__(self, in_features: int, out_features: int, group: int, dtype: ms.Type) -> None:
        super().__init__(in_features, out_features, group, dtype)
        rows, groups = self.scale.shape[0] * PANEL, self.scale.shape[1]
        self.grouped, self.padded = (rows, groups, group), (rows, groups * group)
        self.halve, self.floor, self.times, self.low = ops.Mul(), ops.Floor(), ops.Mul(), ops.Sub()
        self.join, self.centre = ops.Stack(axis=3), ops.Sub()
        self.cast_scale, self.order_scale = ops.Cast(), ops.Transpose()

    def matrix(self) -> Tensor:
        """W, float32 [out, in]."""
        both = self.unpack(self.weight, ms.float32)
        high = self.floor(self.halve(both, 1 / 16))  # exact: a byte and a power of two
        low = self.low(both, self.times(high, 16.0))
        q = self.order(self.join((low, high)), (0, 2, 1, 3, 4))
        q = self.centre(self.reshape(q, self.grouped), 8.0)
        scale = self.order_scale(self.cast_scale(self.scale, ms.float32), (0, 2, 1))
        w = self.scale_up(q, self.reshape(scale, (self.grouped[0], self.grouped[1], 1)))
        return self.reshape(w, self.padded)[: self.out_features, : self.in_features]
