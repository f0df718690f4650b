"""`GLMTrainer`: the task trainer that MindFormers runs, with our optimizer and training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindformers.core.optim import build_optim
from mindformers.trainer import CausalLanguageModelingTrainer
from mindformers.wrapper import build_wrapper
from mindspore import nn
from mindspore.nn import Optimizer

from glm_ms.engine.loss_scale import LossScale


class GLMTrainer(CausalLanguageModelingTrainer):
    """Stock causal language model training, but for two steps of its construction.

    Attributes:
        when_built: called when network, optimizer and training step stand and before the first step, if set.
        loss_scale: that of the training step, None before it is built or without loss scaling.
    """

    when_built: Callable[[], None] | None = None
    loss_scale: LossScale | None = None

    def create_optimizer_scheduler(self, network: nn.Cell, *_: Any, **__: Any) -> Optimizer:
        """One group of parameters: the reference decays all of them, MindFormers exempts norms and biases."""
        self.lr_scheduler = self.create_lr_scheduler(self.config.lr_schedule)
        arguments = {"params": network.trainable_params(), "learning_rate": self.lr_scheduler}
        self.optimizer = build_optim(self.config.optimizer, default_args=arguments)
        return self.optimizer

    def create_model_wrapper(self, network: nn.Cell, optimizer: Optimizer) -> nn.Cell:
        """Our step takes network and optimizer only; the stock one needs an Ascend operator to start."""
        step = build_wrapper(self.config.runner_wrapper, {"network": network, "optimizer": optimizer})
        self.loss_scale = step.loss_scale
        if self.when_built is not None:
            self.when_built()
        return step
