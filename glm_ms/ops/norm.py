"""Normalisation, computed in float32 for inputs of any type."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops


class RMSNormalize(nn.Cell):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis. Zhang & Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.square, self.mean, self.add = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Add()
        self.rsqrt, self.scale, self.weigh = ops.Rsqrt(), ops.Mul(), ops.Mul()
        self.cast, self.cast_weight = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., H], weight [H] -> [..., H], type of x."""
        y = self.cast(x, ms.float32)
        y = self.scale(y, self.rsqrt(self.add(self.mean(self.square(y), -1), self.eps)))
        return self.cast(self.weigh(y, self.cast_weight(weight, ms.float32)), x.dtype)


class LayerNormalize(nn.Cell):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.normalize = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.cast, self.cast_weight = ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [..., H], weight [H], bias [H] -> [..., H], type of x."""
        y, _, _ = self.normalize(
            self.cast(x, ms.float32), self.cast_weight(weight, ms.float32), self.cast_weight(bias, ms.float32)
        )
        return self.cast(y, x.dtype)
