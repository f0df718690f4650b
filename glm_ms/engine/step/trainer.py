"""`GLMTrainer`: the task trainer that MindFormers runs, with our optimizer and training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindformers.core.optim import build_optim
from mindformers.trainer import CausalLanguageModelingTrainer
from mindformers.wrapper import build_wrapper
from mindspore import nn
from mindspore.nn import Optimizer

from glm_ms.engine.step.loss_scale import LossScale
from glm_ms.engine.step.sharding import Sharding


class GLMTrainer(CausalLanguageModelingTrainer):
    """Stock causal language model training, but for two steps of its construction.

    Attributes:
        when_built: called when network, optimizer and training step stand and before the first step, if set.
        loss_scale: that of the training step, None before it is built or without loss scaling.
        step: the training step, None before it is built.
        sharding: this card's part of a sharded run, None where every card has the whole network.
    """

    when_built: Callable[[], None] | None = None
    loss_scale: LossScale | None = None
    step: nn.Cell | None = None
    sharding: Sharding | None = None

    def create_optimizer_scheduler(self, network: nn.Cell, *_: Any, **__: Any) -> Optimizer:
        """One group of parameters: the reference decays all of them, MindFormers exempts norms and biases."""
        self.lr_scheduler = self.create_lr_scheduler(self.config.lr_schedule)
        params = network.trainable_params() if self.sharding is None else self.sharding.trained()
        arguments = {"params": params, "learning_rate": self.lr_scheduler}
        self.optimizer = build_optim(self.config.optimizer, default_args=arguments)
        return self.optimizer

    def wrap_network_with_tool_cells(self, network: nn.Cell) -> nn.Cell:
        """Micro batches and the split of the batch are in our own step."""
        return network

    def create_model_wrapper(self, network: nn.Cell, optimizer: Optimizer) -> nn.Cell:
        """Our step takes network and optimizer only; the stock one needs an Ascend operator to start."""
        if self.sharding is None:
            step = build_wrapper(self.config.runner_wrapper, {"network": network, "optimizer": optimizer})
        else:
            step = self.sharding.step(optimizer)
        self.step = step
        self.loss_scale = step.loss_scale
        if self.when_built is not None:
            self.when_built()
        return step
