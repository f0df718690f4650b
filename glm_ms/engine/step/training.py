"""Network, training step and checkpoints of a run; `glm_ms.engine.step.sharding` has those of a sharded run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mindspore import Parameter, nn
from mindspore.nn import Optimizer

from glm_ms.engine.checkpoints.checkpoints import Checkpoints, WholeCheckpoints, WholeState
from glm_ms.engine.mindformers_internals import build_wrapper
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.step.network import TrainingNetwork, recompute_blocks
from glm_ms.engine.step.train_step import TrainOneStep
from glm_ms.engine.step.trainer_config import step_arguments
from glm_ms.engine.weights import build_model, fuse
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings


class Training:
    """What this rank trains, in a run in which every rank has the whole network and its own rows of a batch.

    Call `build_model`, `build_network`, `build_step` and `fill` in this order.

    Args:
        settings: of the run.
        ranks: of the run.
        say: takes lines for the user.
        model: trained in place of a model built from the settings.

    Attributes:
        checkpoints: of this rank.
        batch_size: rows of a micro batch on each of `batch_ranks`.
        batch_ranks: number of ranks that take different rows.
        batch_rank: number of this rank among them.
        model, network: set by `build_model` and `build_network`.
    """

    model: GLMForCausalLM
    network: TrainingNetwork

    def __init__(
        self, settings: Settings, ranks: Ranks, say: Callable[[str], None], model: GLMForCausalLM | None = None
    ) -> None:
        self.settings, self.ranks, self.say, self.given_model = settings, ranks, say, model
        self.checkpoint: Path | None = None
        self.batch_size = settings.runner_config.batch_size
        self.batch_ranks, self.batch_rank = ranks.size, ranks.rank
        self.checkpoints: Checkpoints = WholeCheckpoints(settings, ranks.first)

    def build_model(self, vocab_size: int, checkpoint: Path | None) -> None:
        """Builds the model, unless one was given.

        Args:
            vocab_size: of the tokenizer.
            checkpoint: to resume from.

        Raises:
            CheckpointError, SettingsError: as `glm_ms.engine.weights.build_model`.
        """
        self.checkpoint = checkpoint
        if self.given_model is not None:
            self.model = self.given_model
            return
        self.model = build_model(self.settings, vocab_size, self.say, checkpoint)
        fuse(self.settings, self.model, self.say)

    def build_network(self, seq_length: int) -> TrainingNetwork:
        """The network with its loss, for rows of `seq_length` tokens."""
        self.network = TrainingNetwork(self.model.network, seq_length)
        recompute_blocks(self.model.network, self.settings)
        return self.network

    def trained_parameters(self) -> list[Parameter]:
        """The parameters that the optimizer of this rank updates."""
        return self.network.trainable_params()

    def replicated_parameters(self) -> list[Parameter]:
        """Trained parameters that every rank has whole, and that must be equal on all."""
        return self.model.network.trainable_params()

    def build_step(self, optimizer: Optimizer) -> TrainOneStep:
        """The training step that the settings name."""
        config = {"type": self.settings.runner_wrapper.type, **step_arguments(self.settings)}
        return build_wrapper(config, {"network": self.network, "optimizer": optimizer})

    def fill(self, step: nn.Cell) -> None:
        """Loads the state of the checkpoint that the run resumes from.

        Raises:
            CheckpointError: it does not fit.
        """
        base_model, has_weights = self.settings.load_checkpoint, self.given_model is None
        self.checkpoints.state = WholeState(self.model, step, base_model, restores_weights=not has_weights)
        if self.checkpoint is not None:
            self.checkpoints.restore(self.checkpoint)
