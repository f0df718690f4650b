"""Loss scaling for float16.

Small float16 gradients vanish, large ones become infinite. The loss is multiplied by a scale before it is
differentiated and the gradients are divided by it in float32 (Micikevicius et al. 2018, "Mixed precision
training", arXiv:1710.03740). An update whose gradients are not finite is skipped.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops.ascend import FloatStatus, saturates

DYNAMIC, FIXED = "DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"
# A dynamic scale grows without overflows; above this value it cannot rescue smaller gradients.
_LARGEST = 2.0**32
# More skipped updates in a row than any first scale needs to fall to 1.
MOST_OVERFLOWS = 50


class OverflowDetector(nn.Cell):
    """Whether the gradients of a step are unusable.

    Infinities and NaN in any gradient make the global norm infinite or NaN. Some Ascend cards saturate instead
    (`glm_ms.ops.ascend.saturates`): there the overflow register is read as well. `all_reduce` sums it over the ranks.
    """

    def __init__(self, all_reduce: nn.Cell | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.is_finite = ops.IsFinite()
        self.all_reduce = all_reduce
        self.register = FloatStatus() if saturates() else None
        if self.register is not None:
            self.flags = Parameter(Tensor(0.0, ms.float32), name="overflow_flags", requires_grad=False)
            self.no_flag = Tensor(0.0, ms.float32)

    def watch(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
        """Reads the register after each micro batch; returns the loss sum."""
        if self.register is None:
            return loss
        return ops.depend(loss, ops.assign_add(self.flags, self.register(gradients)))

    def construct(self, norm: Tensor) -> Tensor:
        """At the end of a step: global gradient norm, float32 scalar -> bool scalar; both are equal on all ranks."""
        overflow = ops.logical_not(self.is_finite(norm))
        if self.register is None:
            return overflow
        flags = self.flags + 0.0
        if self.all_reduce is not None:
            flags = self.all_reduce(flags)
        flags = ops.depend(flags, ops.assign(self.flags, ops.depend(self.no_flag, flags)))
        return ops.logical_or(overflow, flags > 0.0)


class LossScale(nn.Cell):
    """The scale and its counters, as parameters so that checkpoints contain them.

    Args:
        type: DYNAMIC or FIXED.
        loss_scale_value: first scale.
        scale_factor: an overflow divides a dynamic scale by it, `scale_window` good updates in a row multiply it.

    Attributes:
        scale: float32 scalar.
        good_steps: updates made since the last overflow or growth, int32.
        overflows: updates skipped in a row, int32; above 0 the last step was skipped.
    """

    def __init__(self, type: str, loss_scale_value: float, scale_factor: int, scale_window: int) -> None:
        super().__init__(auto_prefix=False)
        self.dynamic = type == DYNAMIC
        self.factor, self.window = float(scale_factor), int(scale_window)
        self.largest = max(_LARGEST, float(loss_scale_value))
        self.scale = Parameter(Tensor(loss_scale_value, ms.float32), name="loss_scale", requires_grad=False)
        self.good_steps = Parameter(Tensor(0, ms.int32), name="loss_scale_good_steps", requires_grad=False)
        self.overflows = Parameter(Tensor(0, ms.int32), name="loss_scale_overflows", requires_grad=False)
        self.select = ops.Select()
        self.no_steps = Tensor(0, ms.int32)

    def construct(self, overflow: Tensor) -> Tensor:
        """After a step: updates scale and counters by `overflow`, bool scalar; returns the overflows in a row."""
        good = self.select(overflow, self.no_steps, self.good_steps + 1)
        if self.dynamic:
            grow = good >= self.window
            grown = self.select(grow, ops.minimum(self.scale * self.factor, self.largest), self.scale + 0.0)
            good = self.select(grow, self.no_steps, good)
            ops.assign(self.scale, self.select(overflow, self.scale / self.factor, grown))
        ops.assign(self.good_steps, good)
        return ops.assign(self.overflows, self.select(overflow, self.overflows + 1, self.no_steps))

    def parameters(self) -> list[Parameter]:
        """The parameters that a checkpoint contains."""
        return [self.scale, self.good_steps, self.overflows]

    def skipped(self) -> bool:
        """Whether the last step made no update."""
        return int(self.overflows.asnumpy()) > 0

    def value(self) -> float:
        """The scale that the next step uses."""
        return float(self.scale.asnumpy())

    def exhausted(self) -> str | None:
        """Why scaling cannot help any more; None if it still can."""
        overflows = int(self.overflows.asnumpy())
        if not overflows:
            return None
        if self.dynamic and self.value() < 1:
            return f"{overflows} updates in a row have overflowed and the loss scale has fallen below 1"
        if overflows >= MOST_OVERFLOWS:
            return f"{overflows} updates in a row have overflowed at loss scale {self.value():g}"
        return None


class ScaledLoss(nn.Cell):
    """A network whose scaled mean loss is differentiated; `network` returns (loss sum, number of labelled tokens).

    The mean over the labelled tokens is scaled and not the sum, which is thousands of times larger and would overflow
    float16 earlier.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, scale: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> mean loss times scale; loss sum; number of labelled tokens. float32 scalars."""
        loss, tokens = self.network(*inputs)
        return loss * (scale / ops.maximum(tokens, 1.0)), loss, tokens
