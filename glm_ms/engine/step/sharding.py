"""Runs whose weights are split over cards: their network, their training step, and their slices on disk.

Everything a card holds goes into a folder of its own, `<output_dir>/slices/rank_N`, which is laid out like the output
folder of any other run; `tools/transform_ckpt.py` merges them by the strategy files in `<output_dir>/strategy`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.communication import get_rank
from mindspore.nn import Optimizer

from glm_ms.convert import CheckpointError, CheckpointReader, load_parameters, open_checkpoint, split_joint
from glm_ms.convert.adapter_files import CONFIG, OPTIMIZER
from glm_ms.convert.tensor_file import slice_metadata
from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.engine.checkpoints.checkpoint import WEIGHTS, read_parameters, write_parameters
from glm_ms.engine.step.sharded_step import PipelineTrainOneStep, ShardedTrainOneStep, spread
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.weights import adapter_config
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.parallel.config import ParallelConfig, parallel_problems
from glm_ms.parallel.loss import VocabularyParallelLoss
from glm_ms.parallel.shard import shard_glm
from glm_ms.parallel.slices import (
    OPTIMIZER_SHARD_THRESHOLD_KB,
    Slice,
    parameter_slices,
    stage_of_parameter,
)
from glm_ms.peft.adapter import AdapterConfig, files_of, write_adapter_config
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.schema import is_sharded, parallel_of
from glm_ms.storage.run_folder import (
    SLICES,
    STRATEGIES,
    list_checkpoints,
    resolve_checkpoint,
    step_folder,
)

_ITEM_BYTES = {ms.float32: 4, ms.float16: 2, ms.bfloat16: 2}


def parallel_context(settings: Settings) -> dict[str, Any]:
    """The `parallel` section for MindFormers, which hands it to `mindspore.set_auto_parallel_context`."""
    values: dict[str, Any] = vars(settings.parallel).copy()
    if is_sharded(settings):
        values["gradients_mean"] = False  # the step divides by the labelled tokens itself
        values["parallel_optimizer_config"] = {"parallel_optimizer_threshold": OPTIMIZER_SHARD_THRESHOLD_KB}
        if settings.recompute_config.parallel_optimizer_comm_recompute:
            # MindSpore 2.9 does not heed the argument of this name of `Cell.recompute`: this level took its place.
            values["parallel_optimizer_config"]["optimizer_level"] = "level3"
    return values


def strategy_file(output_dir: Path, rank: int) -> Path:
    """Where the compiler of a card writes how its parameters are cut."""
    return output_dir / STRATEGIES / f"ckpt_strategy_rank_{rank}.ckpt"


class ShardedTrainingNetwork(nn.Cell):
    """Loss of a global batch of fixed length, split over the cards.

    Args:
        network: is sharded in place.
        parallel: the split.
        seq_length: length of every row.
    """

    def __init__(self, network: GLMNetwork, parallel: ParallelConfig, seq_length: int) -> None:
        super().__init__(auto_prefix=False)
        self.config = network.config
        shard_glm(network, parallel)
        self.network = network
        self.loss = VocabularyParallelLoss(network.config.padded_vocab_size, parallel)
        if parallel.pipeline_stages > 1:
            self.loss.pipeline_stage = parallel.pipeline_stages - 1
        self.slots = Tensor(np.arange(seq_length, dtype=np.int32))

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        dropout_seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All int32 [B, S] of the whole batch, seeds int32 [B] or None for no dropout -> (loss sum, number of labelled
        tokens), float32 scalars."""
        logits = self.network(input_ids, attention_mask, position_ids, self.slots, dropout_seeds)
        return self.loss(logits, labels)

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """MindFormers lists the parameters in its log through this method."""
        return self.trainable_params() if only_trainable else list(self.get_parameters())


class Sharding:
    """One card's part of a sharded run.

    Args:
        settings: of the run, with `parallel_mode: 1`.
        rank: of this card.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.parallel = parallel_of(settings)
        self.stage = rank // self.parallel.stage_cards
        self.output_dir = Path(settings.output_dir)
        self.net: ShardedTrainingNetwork | None = None
        self.state: SliceState | None = None

    @property
    def folder(self) -> Path:
        """This card's own output folder."""
        return rank_folder(self.output_dir, self.rank)

    def network(self, network: GLMNetwork, seq_length: int) -> ShardedTrainingNetwork:
        """The network with its strategies, and its loss.

        Raises:
            SettingsError: the network cannot be split so; known here at last where the tokenizer tells its vocabulary.
        """
        rows = self.rows_per_step // self.parallel.micro_batch_num
        reasons = [r for _, r in parallel_problems(network.config, self.parallel, rows, seq_length)]
        if reasons:
            raise SettingsError(f"{self.settings.where('parallel_config')}: {'; '.join(reasons)}")
        ms.set_auto_parallel_context(
            strategy_ckpt_config={
                "save_file": str(strategy_file(self.output_dir, self.rank)),
                "only_trainable_params": False,
            }
        )
        self.net = ShardedTrainingNetwork(network, self.parallel, seq_length)
        return self.net

    def is_mine(self, parameter: Parameter) -> bool:
        """Whether this card's pipeline stage holds a parameter."""
        return stage_of_parameter(parameter.name, self.net.config, self.parallel) == self.stage

    def trained(self) -> list[Parameter]:
        """What this card's optimizer updates."""
        return [parameter for parameter in self.net.trainable_params() if self.is_mine(parameter)]

    def slices(self) -> dict[str, Slice]:
        """What this card holds of each parameter of its stage; call it before the network is compiled."""
        mine = [parameter for parameter in self.net.get_parameters() if self.is_mine(parameter)]
        shapes = {parameter.name: tuple(parameter.shape) for parameter in mine}
        sizes = {parameter.name: _ITEM_BYTES[parameter.dtype] for parameter in mine}
        return parameter_slices(self.net.config, self.parallel, shapes, sizes)

    def step(self, optimizer: Optimizer) -> GLMTrainOneStep:
        """The training step of this card."""
        wrapper = self.settings.runner_wrapper
        slices = self.slices()
        copies = [slices[parameter.name].copies for parameter in optimizer.parameters]
        norm = wrapper.max_grad_norm if wrapper.use_clip_grad else None
        scale = vars(wrapper.scale_sense) if wrapper.scale_sense.type else None
        network = spread(self.net, self.parallel)
        positions = self.rows_per_step * int(self.net.slots.shape[0])
        if self.parallel.pipeline_stages == 1:
            return ShardedTrainOneStep(network, optimizer, copies, positions, norm, scale)
        return PipelineTrainOneStep(
            network, optimizer, copies, positions, self.parallel, self.rank, norm, scale
        )

    @property
    def rows_per_step(self) -> int:
        """Rows of all cards in one update."""
        parallel = self.parallel
        return self.settings.runner_config.batch_size * parallel.data_parallel * parallel.micro_batch_num

    def compile(self, step: GLMTrainOneStep) -> dict[str, tuple]:
        """Compiles a step, after which every parameter has the shape of its slice, and writes the strategy file.

        Returns:
            Name -> layout, as MindSpore's slicing functions take it, for the parameters of this card's stage.

        Raises:
            CheckpointError: the compiler has cut a parameter otherwise than the rules of `glm_ms.parallel.slices`, by
                which norms are summed.
        """
        expected = self.slices()
        strategy_file(self.output_dir, self.rank).parent.mkdir(parents=True, exist_ok=True)
        step.set_train()
        step.compile(*self.inputs(int(self.net.slots.shape[0])))
        layouts = {name: step.parameter_layout_dict[name] for name in expected}
        for name, known in expected.items():
            found = stored_shape(layouts[name])
            if found != known.shape:
                raise CheckpointError(
                    f"{name}: the compiler gives this card {list(found)}, the rules of glm_ms {list(known.shape)}; "
                    "please report this with the YAML and the version of MindSpore"
                )
        return layouts

    def inputs(self, seq_length: int) -> list[Tensor]:
        """A batch of the shapes that training has."""
        rows = Tensor(np.ones((self.rows_per_step, seq_length), np.int32))
        return [rows] * (len(TRAINING_COLUMNS) - 1) + [Tensor(np.ones((self.rows_per_step,), np.int32))]

    def fill(self, step: GLMTrainOneStep, checkpoint: Path | None, say: Callable[[str], None]) -> None:
        """Compiles the step and gives every parameter its values: of the checkpoint of this card, or of the whole
        weights that the settings name, or random ones.

        Raises:
            CheckpointError: weights that do not fit.
        """
        say(f"compiling for {self.parallel.cards} cards; this takes minutes for a 6B network")
        layouts = self.compile(step)
        metadata = slice_metadata(self.rank, self.parallel.cards)
        adapter, base = adapter_config(self.settings), self.settings.load_checkpoint
        self.state = SliceState(step, self.net, set(layouts), metadata, adapter, base)
        if checkpoint is not None:
            self.state.restore(checkpoint)
        if self.settings.load_checkpoint and (checkpoint is None or self.settings.model.pet_config.pet_type):
            with open_checkpoint(resolve_checkpoint(self.settings.load_checkpoint)) as reader:
                self.load(reader, layouts)

    def find_checkpoint(self) -> Path | None:
        """This card's part of the checkpoint to go on from, which all cards have; None for a new run.

        Raises:
            CheckpointError: `resume_training` is set and there is none.
        """
        resume = self.settings.resume_training
        if resume is False:
            return None
        output_dir = Path(resume) if isinstance(resume, str) else self.output_dir
        step = common_step(output_dir, self.parallel.cards)
        if step is None:
            raise CheckpointError(
                f"{output_dir / SLICES}: no step of which all {self.parallel.cards} cards have their slices; give the "
                "output folder of a run of as many cards, on a file system that all of them see"
            )
        return step_folder(rank_folder(output_dir, self.rank), step)

    def load(self, reader: CheckpointReader, layouts: dict[str, tuple]) -> None:
        """Gives the parameters of this card their slices of a whole checkpoint, a tensor at a time.

        Raises:
            CheckpointError: the checkpoint does not fit the network.
        """
        parameters = {parameter.name: parameter for parameter in self.net.get_parameters()}
        dtype = self.net.config.param_init_type
        for name, whole in whole_parameters(reader, self.net.config):
            if name in layouts:
                put_slice(parameters[name], whole, layouts[name], self.rank, dtype)


class SliceState:
    """What a card of a sharded run saves: its slices of what is trained, and of the optimizer's state.

    The files have the names they have in a checkpoint of any other run, see `TrainingState`.

    Args:
        step: compiled.
        network: of the step.
        mine: names of the parameters of this card's stage.
        metadata: whose slices they are, see `slice_metadata`.
        adapter: what is trained; None for all weights.
        base_model: where the base weights under an adapter came from, noted in its files.
    """

    def __init__(
        self,
        step: GLMTrainOneStep,
        network: ShardedTrainingNetwork,
        mine: set[str],
        metadata: dict[str, str],
        adapter: AdapterConfig | None = None,
        base_model: str = "",
    ) -> None:
        self._config, self._metadata = network.config, metadata
        self._adapter, self._base_model = adapter, base_model
        files = None if adapter is None else files_of(adapter)
        self._file, self._prefix = (WEIGHTS, "") if files is None else (files.weights, files.prefix)
        self._weights = [p for p in network.trainable_params() if p.name in mine]
        owned = {id(parameter) for parameter in network.get_parameters()}
        self._optimizer = [p for p in step.optimizer.get_parameters() if id(p) not in owned]
        self._optimizer += [] if step.loss_scale is None else step.loss_scale.parameters()

    def write(self, folder: Path) -> None:
        """Writes both files and the config into an empty folder, a tensor at a time."""
        write_parameters(folder / self._file, self._weights, "float32", self._prefix, self._metadata)
        write_parameters(folder / OPTIMIZER, self._optimizer, "float32", "", self._metadata)
        if self._adapter is not None:
            write_adapter_config(folder, self._adapter, self._config, self._base_model)
            return
        text = json.dumps(self._config.to_hf_dict(), indent=2)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Loads what `write` has written.

        Raises:
            CheckpointError: a file is damaged, or its tensors are not those of this card.
        """
        read_parameters(folder / self._file, self._weights, self._prefix, self._metadata)
        read_parameters(folder / OPTIMIZER, self._optimizer, "", self._metadata)


def whole_parameters(reader: CheckpointReader, config: GLMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters of a checkpoint under the names of a sharded network: joint layers in their parts."""
    for name, value in load_parameters(reader, config, config.param_init_type):
        yield from split_joint(name, value, config)


def put_slice(parameter: Parameter, whole: np.ndarray, layout: tuple, rank: int, dtype: str) -> None:
    """Overwrites a parameter with its part of a whole array."""
    value = cut(whole, layout, rank)
    if dtype == "bfloat16":  # bit patterns, which NumPy has no type for
        value = (value.astype(np.uint32) << 16).view(np.float32)
    parameter.set_data(Tensor(value, parameter.dtype), slice_shape=True)


def stored_shape(layout: tuple) -> tuple[int, ...]:
    """What a card stores of a parameter, from MindSpore's layout."""
    shape = list(layout[2])
    group = layout[5]
    if group:
        shape[0] //= ms.communication.get_group_size(group)
    return tuple(shape)


def cut(whole: np.ndarray, layout: tuple, rank: int) -> np.ndarray:
    """A card's part of a whole array: by device matrix and tensor map, then by the group of the sharded optimizer."""
    devices, tensor_map, group = list(layout[0]), list(layout[1]), layout[5]
    place = np.unravel_index(rank % int(np.prod(devices)), devices)
    for axis, mapped in enumerate(tensor_map):
        if mapped == -1:
            continue
        which = len(devices) - 1 - mapped
        length = whole.shape[axis] // devices[which]
        begin = int(place[which]) * length
        whole = np.take(whole, range(begin, begin + length), axis)
    if group:
        size, number = ms.communication.get_group_size(group), get_rank(group)
        length = whole.shape[0] // size
        whole = whole[number * length : (number + 1) * length]
    return np.ascontiguousarray(whole)


def rank_folder(output_dir: Path, rank: int) -> Path:
    """The output folder of one card of a sharded run."""
    return output_dir / SLICES / f"rank_{rank}"


def common_step(output_dir: Path, cards: int) -> int | None:
    """The newest step whose checkpoint all cards have written; None if there is none."""
    steps = [{step for step, _ in list_checkpoints(rank_folder(output_dir, rank))} for rank in range(cards)]
    return max(set.intersection(*steps), default=None)
