"""One training step: gradients, accumulation, clipping, loss scaling, update."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore.communication import get_group_size
from mindspore.nn import Optimizer

from glm_ms.engine.step.loss_scale import LossScale, OverflowDetector, ScaledLoss
from glm_ms.ops.registry import step_operator

Gradients = tuple[Tensor, ...]
# Mean loss over the labelled tokens, global gradient norm before clipping, learning rate, number of labelled tokens:
# float32 scalars.
StepResult = tuple[Tensor, Tensor, Tensor, Tensor]
# torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6.
_CLIP_EPS = 1e-6


class TrainOneStep(nn.Cell):
    """Clipping, loss scaling and update of a training step; a subclass computes the gradients.

    With loss scaling a step that overflows changes neither weights nor moments nor the optimizer's counter of
    updates, so the learning rate, a function of that counter, waits as well: a run with k skipped steps ends k
    updates before the end of its schedule. All ranks decide alike, by the norm of the summed gradients.

    Args:
        network: cell that the subclass differentiates.
        optimizer: called with the gradients, returns the learning rate it used; one whose attribute `takes_scale` is
            true is also called with their factor.
        all_reduce: sums a tensor over the ranks; None on a single one.
        max_grad_norm: largest global gradient norm, None for no clipping.
        loss_scale: arguments of `LossScale`; None, or no `type` in it, for no scaling.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: Optimizer,
        all_reduce: nn.Cell | None,
        max_grad_norm: float | None,
        loss_scale: dict[str, Any] | None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.network.set_grad()
        self.optimizer = optimizer
        self.weights: ParameterTuple = optimizer.parameters
        self.all_reduce: Any = all_reduce
        self.max_grad_norm = max_grad_norm
        self.square_sum = step_operator("square sum")
        self.takes_scale = getattr(optimizer, "takes_scale", False)
        self.loss_scale = LossScale(**loss_scale) if loss_scale and loss_scale.get("type") else None
        if self.loss_scale is not None:
            self.overflow = OverflowDetector(all_reduce)
        self.zero = Tensor(0.0, ms.float32)

    def finish(self, loss: Tensor, tokens: Tensor, gradients: Gradients) -> StepResult:
        """Mean, clip, update, with loss sum, labelled tokens and gradients of the loss sum of a whole step."""
        tokens = ops.maximum(tokens, 1.0)
        norm = ops.sqrt(self.squares(gradients)) / tokens
        scale = 1.0 / tokens
        if self.max_grad_norm is not None:
            scale = scale * ops.minimum(self.max_grad_norm / (norm + _CLIP_EPS), 1.0)
        return loss / tokens, norm, self.update(gradients, scale, norm), tokens

    def squares(self, gradients: Gradients) -> Tensor:
        """Sum of the squares of all elements, float32 scalar."""
        return self.square_sum(gradients)

    def update(self, gradients: Gradients, scale: Tensor, norm: Tensor) -> Tensor:
        """Updates with the scaled gradients unless they have overflowed; returns the learning rate."""
        # A kernel writes into the weights without the graph's knowing. The norm comes after all that reads them.
        scale = ops.depend(scale, norm)
        if self.loss_scale is None:
            return self.optimize(gradients, scale)
        overflow = self.overflow(norm)
        rate = ops.reshape(ops.cast(self.optimizer.get_lr(), ms.float32), ())
        if not overflow:
            rate = self.optimize(gradients, scale)
        return ops.depend(rate, self.loss_scale(overflow))

    def optimize(self, gradients: Gradients, scale: Tensor) -> Tensor:
        """Calls the optimizer with the gradients times a scalar; returns the learning rate."""
        if self.takes_scale:
            return self.optimizer(gradients, scale)
        return self.optimizer(self.scaled(gradients, scale))

    def scaled(self, gradients: Gradients, scale: Tensor) -> Gradients:
        """Every gradient times a scalar."""
        result: Gradients = ()
        for gradient in gradients:
            result += (gradient * ops.cast(scale, gradient.dtype),)
        return result


class GLMTrainOneStep(TrainOneStep):
    """Sums loss and gradients over micro batches and ranks, divides by the labelled tokens, clips, updates.

    Dividing once, by all tokens of the step, makes a step with N micro batches or N ranks equal to one with a
    batch N times as large.

    The network returns (loss sum, number of labelled tokens). `accumulation_steps` is the number of micro batches per
    update, `use_parallel` says whether to sum over the ranks of a data parallel run. For the others see `TrainOneStep`.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: Optimizer,
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        use_parallel: bool = False,
        loss_scale: dict[str, Any] | None = None,
    ) -> None:
        all_reduce = ops.AllReduce() if use_parallel and get_group_size() > 1 else None
        super().__init__(network, optimizer, all_reduce, max_grad_norm, loss_scale)
        differentiated = network if self.loss_scale is None else ScaledLoss(network)
        self.value_and_grad = ops.value_and_grad(differentiated, None, self.weights, has_aux=True)
        self.accumulation_steps = accumulation_steps
        if accumulation_steps > 1:
            self.gradient_sums = self.weights.clone(prefix="gradient_sum", init="zeros")
            self.loss_sum = ms.Parameter(Tensor(0.0, ms.float32), name="loss_sum", requires_grad=False)
            self.token_sum = ms.Parameter(Tensor(0.0, ms.float32), name="token_sum", requires_grad=False)
            self.micro_step = ms.Parameter(Tensor(0, ms.int32), name="micro_step", requires_grad=False)

    def construct(self, *inputs: Tensor) -> StepResult:
        """One micro batch. Returns zeros if the step needs more micro batches."""
        loss, tokens, gradients = self.differentiate(inputs)
        if self.accumulation_steps == 1:
            return self.reduce_and_finish(loss, tokens, gradients)
        for i in range(len(gradients)):
            ops.assign_add(self.gradient_sums[i], gradients[i])
        ops.assign_add(self.loss_sum, loss)
        ops.assign_add(self.token_sum, tokens)
        ops.assign_add(self.micro_step, 1)
        if self.micro_step == self.accumulation_steps:
            result = self.reduce_and_finish(self.loss_sum + 0.0, self.token_sum + 0.0, self.gradient_sums)
            for total in self.gradient_sums:
                ops.assign(total, ops.zeros_like(total))
            ops.assign(self.loss_sum, self.zero)
            ops.assign(self.token_sum, self.zero)
            ops.assign(self.micro_step, 0)
            return result
        return self.zero, self.zero, self.zero, self.zero

    def differentiate(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Gradients]:
        """Loss sum, number of labelled tokens and gradients of the loss sum of a micro batch."""
        if self.loss_scale is None:
            (loss, tokens), gradients = self.value_and_grad(*inputs)
            return loss, tokens, gradients
        scale = self.loss_scale.scale + 0.0
        (_, loss, tokens), gradients = self.value_and_grad(scale, *inputs)
        loss = self.overflow.watch(loss, gradients)
        return loss, tokens, self.scaled(gradients, ops.maximum(tokens, 1.0) / scale)

    def reduce_and_finish(self, loss: Tensor, tokens: Tensor, gradients: Gradients) -> StepResult:
        """`finish` with the sums over all ranks."""
        if self.all_reduce is None:
            return self.finish(loss, tokens, gradients)
        total: Gradients = ()
        for gradient in gradients:
            total += (self.all_reduce(gradient),)
        return self.finish(self.all_reduce(loss), self.all_reduce(tokens), total)
