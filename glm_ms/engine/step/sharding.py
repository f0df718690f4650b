"""Network, training step and checkpoints of a run whose weights MindSpore's parallel compiler splits over the cards.

The compiler inserts the sums over what the strategies split: every card gets the whole loss and token count, and the
gradient of the whole batch for its slice of each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import create_group
from mindspore.nn import Optimizer

from glm_ms.convert.tensor_file import slice_metadata
from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.engine.checkpoints.slices import SliceCheckpoints, SliceState, load_slices, stored_shape
from glm_ms.engine.mindformers_internals import VirtualDatasetCell
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.step.network import ShardedTrainingNetwork, recompute_blocks
from glm_ms.engine.step.train_step import Gradients, StepResult, TrainOneStep
from glm_ms.engine.step.training import Training, step_arguments
from glm_ms.engine.weights import adapter_config, build_unfilled_model
from glm_ms.generation import GLMForCausalLM
from glm_ms.parallel.config import ParallelConfig, parallel_problems
from glm_ms.parallel.partition import Slice, parameter_slices, stage_of_parameter
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.schema import parallel_of
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import STRATEGIES, resolve_checkpoint

_ITEM_BYTES = {ms.float32: 4, ms.float16: 2, ms.bfloat16: 2}


class ShardedTraining(Training):
    """What one card trains in a sharded run: every card reads the whole batch, and the strategies split it.

    The weights are loaded by `fill`, slice by slice: no card can have the whole network.
    """

    def __init__(self, settings: Settings, ranks: Ranks, say: Say, model: GLMForCausalLM | None = None) -> None:
        super().__init__(settings, ranks, say, model)
        self.parallel = parallel_of(settings)
        self.stage = ranks.rank // self.parallel.stage_cards
        self.strategy_file = Path(settings.output_dir) / STRATEGIES / f"ckpt_strategy_rank_{ranks.rank}.ckpt"
        self.batch_size *= self.parallel.data_parallel * self.parallel.micro_batch_num
        self.batch_ranks, self.batch_rank = 1, 0
        self.static_shapes = True
        self.checkpoints = SliceCheckpoints(settings, ranks.rank, self.parallel.cards)

    def build_model(self, vocab_size: int, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        # A given model is not sharded; its weights come from `load_checkpoint` as well.
        self.model = build_unfilled_model(self.settings, vocab_size, self.say)

    def build_network(self, seq_length: int) -> ShardedTrainingNetwork:
        """Raises SettingsError if the network cannot be split like this, which is known only here if the tokenizer
        decides the size of the vocabulary."""
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
        slices = self._slices()
        copies = [slices[parameter.name].copies for parameter in optimizer.parameters]
        return ShardedTrainOneStep(self, optimizer, copies)

    def fill(self, step: nn.Cell) -> None:
        """Compiles the step and gives every parameter its values: of the checkpoint of this card, of the whole weights
        that the settings name, or random ones. Raises CheckpointError for weights that do not fit."""
        self.say(f"compiling for {self.parallel.cards} cards; this takes minutes for a 6B network")
        layouts = self.compile(step)
        metadata = slice_metadata(self.ranks.rank, self.parallel.cards)
        adapter, base = adapter_config(self.settings), self.settings.load_checkpoint
        self.checkpoints.state = SliceState(step, self.network, set(layouts), metadata, adapter, base)
        if self.checkpoint is not None:
            self.checkpoints.restore(self.checkpoint)
        if base and (self.checkpoint is None or adapter is not None):
            load_slices(resolve_checkpoint(base), self.network, layouts, self.ranks.rank)

    def compile(self, step: nn.Cell) -> dict[str, tuple]:
        """Compiles a step, after which every parameter has the shape of its slice, and writes the strategy file.

        Returns name -> layout, as MindSpore's slicing functions take it, for the parameters of this card's stage.

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

    def _is_mine(self, parameter: Parameter) -> bool:
        return stage_of_parameter(parameter.name, self.network.config, self.parallel) == self.stage

    def _slices(self) -> dict[str, Slice]:
        """Name -> slice of every parameter of this card's stage; call it before the network is compiled."""
        mine = [parameter for parameter in self.network.get_parameters() if self._is_mine(parameter)]
        shapes = {parameter.name: tuple(parameter.shape) for parameter in mine}
        sizes = {parameter.name: _ITEM_BYTES[parameter.dtype] for parameter in mine}
        return parameter_slices(self.network.config, self.parallel, shapes, sizes)


class Stacked(nn.Cell):
    """Loss sum and token count as one tensor.

    A pipeline adds one tensor over its micro batches. And the compiler divides a derivative by the number of cards that
    have the same output only if the network has one output; with several, every gradient would be that many times too
    large.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.reshape = ops.Reshape()
        self.join = ops.Concat().shard(((1,), (1,)))

    def construct(self, *inputs: Tensor) -> Tensor:
        """-> float32 [2]."""
        loss, tokens = self.network(*inputs)
        return self.join((self.reshape(loss, (1,)), self.reshape(tokens, (1,))))


def spread(network: nn.Cell, parallel: ParallelConfig) -> nn.Cell:
    """A network whose inputs are distributed over the cards and, with pipeline stages, over micro batches.

    `network` returns (loss sum, number of labelled tokens) of a micro batch. The result is a cell that returns both for
    a whole step, as one tensor [2].
    """
    step: nn.Cell = Stacked(network)
    if parallel.pipeline_stages > 1:
        step = nn.PipelineCell(step, parallel.micro_batch_num)
        for add in step.add_list:
            add.shard(((1,), (1,)))
    return VirtualDatasetCell(step)


class ShardedTrainOneStep(TrainOneStep):
    """A training step on slices: only the norm of the gradients needs a sum over the cards.

    With pipeline stages several micro batches are in the pipeline at the same time; the gradients of a card are those
    of its own stage, and only the last stage knows the loss.

    The optimizer is that of the slices of this card's stage; `copies` says for each of its parameters how many cards
    have each element.
    """

    def __init__(self, training: ShardedTraining, optimizer: Optimizer, copies: Sequence[int]) -> None:
        parallel, arguments = training.parallel, step_arguments(training.settings)
        network = spread(training.network, parallel)
        super().__init__(network, optimizer, ops.AllReduce(), arguments["max_grad_norm"], arguments["loss_scale"])
        self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)
        # With loss scaling the loss sum divided by the positions of a step, padding included, is differentiated.
        self.part = 1.0 / (training.batch_size * training.network.seq_length)
        self.shares = tuple(1.0 / number for number in copies)
        self.has_stages = parallel.pipeline_stages > 1
        if self.has_stages:
            self.network.add_flags(defer_inline=True)
            self.reducer = nn.PipelineGradReducer(optimizer.parameters)
            # The cards that have the same place in every stage.
            place = training.ranks.rank % parallel.stage_cards
            group = f"glm_stages_{place}"
            create_group(group, list(range(place, parallel.cards, parallel.stage_cards)))
            self.all_reduce_stages = ops.AllReduce(group=group)

    def construct(self, *inputs: Tensor) -> StepResult:
        """One whole step."""
        both = self.network(*inputs)
        scale = ops.ones_like(self.zero)
        if self.loss_scale is not None:
            scale = self.loss_scale.scale * self.part
        gradients = self.gradient(self.network, self.weights)(*inputs, ops.ones_like(both) * scale)
        if self.has_stages:
            gradients = self.reducer(gradients)
            both = self.all_reduce_stages(both)
        loss, tokens = both[0], both[1]
        if self.loss_scale is not None:
            loss = self.overflow.watch(loss, gradients)
            gradients = self.scaled(gradients, 1.0 / scale)
        return self.finish(loss, tokens, gradients)

    def squares(self, gradients: Gradients) -> Tensor:
        """Sum of the squares of all elements of the whole gradients, each counted once."""
        squares = self.zero
        for i in range(len(gradients)):
            squares = squares + self.square_sum((gradients[i],)) * self.shares[i]
        return self.all_reduce(squares)
