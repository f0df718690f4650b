"""C++ kernels of a training step; `glm_ms.ops.training` defines what they compute."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops.cpu.custom import custom


class SquareSum(nn.Cell):
    """As the portable operator: one pass over each tensor at the speed of memory, one result for any number of threads.

    Blocks are added up in float32, their sums in double.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum = custom("square_sum", (1,), ms.float32)

    def construct(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """float32 tensors -> float32 scalar."""
        return ops.reshape(self.sum(*tensors), ())


class AdamWUpdate(nn.Cell):
    """As the portable operator, in one pass over weight, moments and gradient, and without a scaled gradient.

    The moments have the same bits as those of the portable operator; its division is not exactly rounded, this one is,
    so weights may differ by 1e-6 of an update and the rounding of the weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.update = custom("adamw", (1,), ms.float32, in_place=True)

    def construct(
        self, weight: Parameter, m: Parameter, v: Parameter, gradient: Tensor, rate: Tensor, beta1: Tensor,
        beta2: Tensor, eps: Tensor, decay: Tensor, scale: Tensor
    ) -> Tensor:  # fmt: skip
        """As the portable operator."""
        return self.update(weight, m, v, gradient, rate, beta1, beta2, eps, decay, scale)
