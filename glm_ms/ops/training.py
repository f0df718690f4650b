"""Portable operators of a training step: squares of the gradients, update of the weights."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops


class SquareSum(nn.Cell):
    """Sum of the squares of all elements of some tensors, in float32. Infinite or NaN if one of them is."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.ReduceSum()
        self.zero = Tensor(0.0, ms.float32)

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Tensors of any shapes -> float32 scalar."""
        total = self.zero
        for tensor in tensors:
            total = total + self.sum(ops.square(ops.cast(tensor, ms.float32)))
        return total


class AdamWUpdate(nn.Cell):
    """One update of one parameter in place, with decoupled decay and without bias correction.

    g = gradient scale, m += (1 - beta1) (g - m), v += (1 - beta2) (g^2 - v),
    weight -= rate (m / (sqrt(v) + eps) + decay weight). Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    def __init__(self) -> None:
        super().__init__()
        self.update = ops.AdamWeightDecay()

    def construct(
        self, weight: Parameter, m: Parameter, v: Parameter, gradient: Tensor, rate: Tensor, beta1: Tensor,
        beta2: Tensor, eps: Tensor, decay: Tensor, scale: Tensor
    ) -> Tensor:  # fmt: skip
        """weight, m, v, gradient float32 of one shape, the others float32 scalars; the result is of no use."""
        scaled = gradient * scale
        return self.update(weight, m, v, rate, beta1, beta2, eps, decay, scaled)[0]
