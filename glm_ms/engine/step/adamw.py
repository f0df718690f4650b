"""AdamW with decoupled decay and bias correction."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from glm_ms.ops.registry import step_operator


class GLMAdamW(nn.Optimizer):
    """Loshchilov & Hutter 2019 (arXiv:1711.05101), as torch.optim.AdamW computes it.

    Every parameter decays, norms and biases too. The operator "AdamW" updates moments and weight in one pass but has
    no bias correction; with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t) it gives the corrected update if it is called
    with learning rate lr c2 / c1, eps c2 and decay wd c1 / c2.

    `learning_rate` is a schedule over the number of updates made so far, or a constant. `eps` is added to the root of
    the corrected second moment. Raises ValueError if a parameter is not float32.
    """

    # The training step passes its factor of the gradients on.
    takes_scale = True

    def __init__(
        self,
        params: Sequence[Parameter],
        learning_rate: float | LearningRateSchedule,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        half = [parameter for parameter in params if parameter.dtype != ms.float32]
        if half:
            # Their squared gradients would vanish, and small updates round away.
            raise ValueError(f"GLMAdamW trains float32 parameters only; {half[0].name} is {half[0].dtype}")
        super().__init__(learning_rate, params)
        self.decay = weight_decay
        self.beta1, self.beta2, self.eps = float(betas[0]), float(betas[1]), float(eps)
        self.moments1 = self.parameters.clone(prefix="adam_m", init="zeros")
        self.moments2 = self.parameters.clone(prefix="adam_v", init="zeros")
        self.beta1_tensor = Tensor(self.beta1, ms.float32)
        self.beta2_tensor = Tensor(self.beta2, ms.float32)
        self.update = step_operator("AdamW")
        self.no_scale = Tensor(1.0, ms.float32)
        self.power = ops.Pow()
        self.sqrt = ops.Sqrt()

    def construct(self, gradients: tuple[Tensor, ...], scale: Tensor | None = None) -> Tensor:
        """Updates every parameter with its gradient times `scale`, float32 scalar, None for 1; returns the learning
        rate used, float32 scalar."""
        scale = self.no_scale if scale is None else scale
        rate = ops.cast(self.get_lr(), ms.float32)
        step = ops.cast(self.global_step, ms.float32) + 1.0
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        c1 = 1.0 - self.power(self.beta1_tensor, step)
        c2 = self.sqrt(1.0 - self.power(self.beta2_tensor, step))
        done = ops.reshape(rate, ())
        scaled_rate = ops.reshape(rate * c2 / c1, ())
        eps = ops.reshape(self.eps * c2, ())
        decay = ops.reshape(self.decay * c1 / c2, ())
        for i in range(len(gradients)):
            self.update(
                self.parameters[i], self.moments1[i], self.moments2[i], gradients[i], scaled_rate, self.beta1_tensor,
                self.beta2_tensor, eps, decay, scale
            )  # fmt: skip
        return done
