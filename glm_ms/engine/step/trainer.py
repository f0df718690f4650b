"""`GLMTrainer`: the task trainer that MindFormers runs, with our optimizer and training step."""

from __future__ import annotations

from typing import Any

from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore import nn
from mindspore.nn import Optimizer

from glm_ms.engine.mindformers_internals import MindFormerModuleType, build_optim, register_class
from glm_ms.engine.step.optimizers import build_schedule, optimizer_class
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.step.training import Training
from glm_ms.settings import Settings


class GLMTrainer(CausalLanguageModelingTrainer):
    """The causal language model training of MindFormers with other steps of its construction.

    Attributes:
        training: builds and fills network and training step; set before `train`.
        total_steps: updates of the whole run, over which the learning rate is scheduled; set before `train`.
    """

    training: Training
    total_steps: int

    def create_optimizer_scheduler(self, network: nn.Cell, *_: Any, **__: Any) -> Optimizer:
        """One group of parameters: the reference decays all of them, MindFormers exempts norms and biases."""
        self.lr_scheduler = build_schedule(self.training.settings.lr_schedule, self.total_steps)
        arguments = {"params": self.training.trained_parameters(), "learning_rate": self.lr_scheduler}
        self.optimizer = build_optim(self.config.optimizer, default_args=arguments)
        return self.optimizer

    def wrap_network_with_tool_cells(self, network: nn.Cell) -> nn.Cell:
        """Unchanged: our step splits the batch and accumulates micro batches itself."""
        return network

    def create_model_wrapper(self, network: nn.Cell, optimizer: Optimizer) -> nn.Cell:
        """Our step, with all weights and states loaded."""
        step = self.training.build_step(optimizer)
        self.training.fill(step)
        return step


def register_classes(settings: Settings) -> None:
    """Enters the classes that the settings name into MindFormers' registry: optimizer, training step, trainer.

    Raises:
        NameTakenError: another package has registered a class under one of their names.
    """
    register_class(optimizer_class(settings.optimizer.type), MindFormerModuleType.OPTIMIZER)
    register_class(GLMTrainOneStep, MindFormerModuleType.WRAPPER)
    register_class(GLMTrainer, MindFormerModuleType.TRAINER)
