"""Network, training step and checkpoints of a run whose weights are split over the cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn import Optimizer

from glm_ms.convert.reader import open_checkpoint
from glm_ms.convert.tensor_file import slice_metadata
from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.engine.checkpoints.slices import SliceCheckpoints, SliceState, put_slice, stored_shape, whole_parameters
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.step.network import ShardedTrainingNetwork, recompute_blocks
from glm_ms.engine.step.sharded_step import ShardedTrainOneStep, spread
from glm_ms.engine.step.train_step import TrainOneStep
from glm_ms.engine.step.trainer_config import step_arguments, strategy_file
from glm_ms.engine.step.training import Training
from glm_ms.engine.weights import adapter_config, build_unfilled_model
from glm_ms.generation import GLMForCausalLM
from glm_ms.parallel.config import parallel_problems
from glm_ms.parallel.partition import Slice, parameter_slices, stage_of_parameter
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.schema import parallel_of
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import resolve_checkpoint

_ITEM_BYTES = {ms.float32: 4, ms.float16: 2, ms.bfloat16: 2}


class ShardedTraining(Training):
    """What one card trains in a sharded run: every card reads the whole batch, and the strategies split it.

    The weights are loaded by `fill`, slice by slice: no card can have the whole network.
    """

    def __init__(
        self, settings: Settings, ranks: Ranks, say: Callable[[str], None], model: GLMForCausalLM | None = None
    ) -> None:
        super().__init__(settings, ranks, say, model)
        self.parallel = parallel_of(settings)
        self.stage = ranks.rank // self.parallel.stage_cards
        self.strategy_file = strategy_file(Path(settings.output_dir), ranks.rank)
        self.batch_size *= self.parallel.data_parallel * self.parallel.micro_batch_num
        self.batch_ranks, self.batch_rank = 1, 0
        self.checkpoints = SliceCheckpoints(settings, ranks.rank, self.parallel.cards)

    def build_model(self, vocab_size: int, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        # A given model is not sharded; its weights come from `load_checkpoint` as well.
        self.model = build_unfilled_model(self.settings, vocab_size, self.say)

    def build_network(self, seq_length: int) -> ShardedTrainingNetwork:
        """The network with its strategies and its loss.

        Raises:
            SettingsError: the network cannot be split like this; known only here if the tokenizer decides the size of
                the vocabulary.
        """
        network = self.model.network
        rows = self.batch_size // self.parallel.micro_batch_num
        reasons = [r for _, r in parallel_problems(network.config, self.parallel, rows, seq_length)]
        if reasons:
            raise SettingsError(f"{self.settings.where('parallel_config')}: {'; '.join(reasons)}")
        ms.set_auto_parallel_context(
            strategy_ckpt_config={"save_file": str(self.strategy_file), "only_trainable_params": False}
        )
        self.network = ShardedTrainingNetwork(network, self.parallel, seq_length)
        recompute_blocks(network, self.settings)
        return self.network

    def trained_parameters(self) -> list[Parameter]:
        return [parameter for parameter in self.network.trainable_params() if self._is_mine(parameter)]

    def replicated_parameters(self) -> list[Parameter]:
        return []

    def build_step(self, optimizer: Optimizer) -> TrainOneStep:
        """The training step of this card."""
        slices, arguments = self._slices(), step_arguments(self.settings)
        copies = [slices[parameter.name].copies for parameter in optimizer.parameters]
        positions = self.batch_size * self.network.seq_length
        return ShardedTrainOneStep(
            spread(self.network, self.parallel), optimizer, copies, positions, self.parallel, self.ranks.rank,
            arguments["max_grad_norm"], arguments["loss_scale"]
        )  # fmt: skip

    def fill(self, step: nn.Cell) -> None:
        """Compiles the step and gives every parameter its values: of the checkpoint of this card, of the whole weights
        that the settings name, or random ones.

        Raises:
            CheckpointError: weights that do not fit.
        """
        self.say(f"compiling for {self.parallel.cards} cards; this takes minutes for a 6B network")
        layouts = self.compile(step)
        metadata = slice_metadata(self.ranks.rank, self.parallel.cards)
        adapter, base = adapter_config(self.settings), self.settings.load_checkpoint
        self.checkpoints.state = SliceState(step, self.network, set(layouts), metadata, adapter, base)
        if self.checkpoint is not None:
            self.checkpoints.restore(self.checkpoint)
        if base and (self.checkpoint is None or adapter is not None):
            self._load_slices(resolve_checkpoint(base), layouts)

    def compile(self, step: nn.Cell) -> dict[str, tuple]:
        """Compiles a step, after which every parameter has the shape of its slice, and writes the strategy file.

        Returns:
            Name -> layout, as MindSpore's slicing functions take it, for the parameters of this card's stage.

        Raises:
            CheckpointError: the compiler has sliced a parameter differently from the rules of
                `glm_ms.parallel.partition`, by which norms are summed.
        """
        expected = self._slices()  # before compiling, which changes the shapes
        self.strategy_file.parent.mkdir(parents=True, exist_ok=True)
        rows = Tensor(np.ones((self.batch_size, self.network.seq_length), np.int32))
        seeds = Tensor(np.ones((self.batch_size,), np.int32))
        step.set_train()
        step.compile(*[rows] * (len(TRAINING_COLUMNS) - 1), seeds)
        layouts = {name: step.parameter_layout_dict[name] for name in expected}
        for name, known in expected.items():
            found = stored_shape(layouts[name])
            if found != known.shape:
                raise CheckpointError(
                    f"{name}: the compiler gives this card {list(found)}, the rules of glm_ms {list(known.shape)}; "
                    "please report this with the YAML and the version of MindSpore"
                )
        return layouts

    def _load_slices(self, path: Path, layouts: dict[str, tuple]) -> None:
        """Gives the parameters of this card their slices of a whole checkpoint, a tensor at a time."""
        parameters = {parameter.name: parameter for parameter in self.network.get_parameters()}
        config = self.network.config
        with open_checkpoint(path) as reader:
            for name, whole in whole_parameters(reader, config):
                if name in layouts:
                    put_slice(parameters[name], whole, layouts[name], self.ranks.rank, config.param_init_type)

    def _is_mine(self, parameter: Parameter) -> bool:
        """Whether this card's pipeline stage has a parameter."""
        return stage_of_parameter(parameter.name, self.network.config, self.parallel) == self.stage

    def _slices(self) -> dict[str, Slice]:
        """Name -> slice of every parameter of this card's stage; call it before the network is compiled."""
        mine = [parameter for parameter in self.network.get_parameters() if self._is_mine(parameter)]
        shapes = {parameter.name: tuple(parameter.shape) for parameter in mine}
        sizes = {parameter.name: _ITEM_BYTES[parameter.dtype] for parameter in mine}
        return parameter_slices(self.network.config, self.parallel, shapes, sizes)
