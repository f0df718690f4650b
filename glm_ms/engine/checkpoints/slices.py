"""Checkpoints of sharded runs: every card writes its slices into an output folder of its own.

`<output_dir>/slices/rank_N` has the layout of the output folder of any other run; `tools/transform_ckpt.py` merges the
slices by the strategy files in `<output_dir>/strategy`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor, nn
from mindspore.communication import get_group_size

from glm_ms.convert.cluster.layout import Layout
from glm_ms.convert.names import split_joint
from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.engine.checkpoints.checkpoints import (
    WEIGHTS,
    Checkpoints,
    optimizer_state,
    read_parameters,
    write_config,
    write_parameters,
)
from glm_ms.model.config import GLMConfig
from glm_ms.peft import ADAPTERS
from glm_ms.peft.adapter import AdapterConfig
from glm_ms.settings import Settings
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import OPTIMIZER, SLICES, list_checkpoints, step_folder


class SliceCheckpoints(Checkpoints):
    """Checkpoints of one of the `cards` of a sharded run."""

    def __init__(self, settings: Settings, rank: int, cards: int) -> None:
        # One more than asked for: other cards may still be writing the newest, and only a step that all have counts.
        keep_max = settings.checkpoint.keep_max + 1
        super().__init__(settings, rank_folder(Path(settings.output_dir), rank), True, keep_max)
        self.rank, self.cards = rank, cards

    def find(self) -> Path | None:
        """This card's part of the newest checkpoint that all cards have."""
        resume = self.settings.resume_training
        if resume is False:
            return None
        output_dir = Path(resume if isinstance(resume, str) else self.settings.output_dir)
        step = common_step(output_dir, self.cards)
        if step is None:
            raise CheckpointError(
                f"{output_dir / SLICES}: no step of which all {self.cards} cards have their slices; give the output "
                "folder of a run on as many cards, on a file system that all of them see"
            )
        return step_folder(rank_folder(output_dir, self.rank), step)


class SliceState:
    """The slices of one card: of the trained parameters and of the optimizer's state.

    The files have the names that they have in a checkpoint of any other run, see `WholeState`.

    Args:
        step: compiled, so that parameters have the shapes of their slices.
        mine: names of the parameters of this card's pipeline stage.
        metadata: of the files, see `slice_metadata`.
    """

    def __init__(
        self,
        step: nn.Cell,
        network: nn.Cell,
        mine: set[str],
        metadata: dict[str, str],
        adapter: AdapterConfig | None,
        base_model: str,
    ) -> None:
        self._config, self._metadata = network.config, metadata
        self._adapter, self._base_model = adapter, base_model
        files = None if adapter is None else ADAPTERS[adapter.kind].files
        self._file, self._prefix = (WEIGHTS, "") if files is None else (files.weights, files.prefix)
        self._weights = [p for p in network.trainable_params() if p.name in mine]
        self._optimizer = optimizer_state(step, network)

    def write(self, folder: Path) -> None:
        write_parameters(folder / self._file, self._weights, "float32", self._prefix, self._metadata)
        write_parameters(folder / OPTIMIZER, self._optimizer, "float32", "", self._metadata)
        if self._adapter is None:
            write_config(folder, self._config)
        else:
            kind = ADAPTERS[self._adapter.kind].load()
            kind.write_config(folder, self._adapter, self._config, self._base_model)

    def restore(self, folder: Path) -> None:
        read_parameters(folder / self._file, self._weights, self._prefix, self._metadata)
        read_parameters(folder / OPTIMIZER, self._optimizer, "", self._metadata)


def rank_folder(output_dir: Path, rank: int) -> Path:
    """The output folder of one card of a sharded run."""
    return output_dir / SLICES / f"rank_{rank}"


def common_step(output_dir: Path, cards: int) -> int | None:
    """The newest step whose checkpoint all cards have written; None if there is none."""
    steps = [{step for step, _ in list_checkpoints(rank_folder(output_dir, rank))} for rank in range(cards)]
    return max(set.intersection(*steps), default=None)


def load_slices(path: Path, network: nn.Cell, layouts: dict[str, tuple], rank: int) -> None:
    """Gives a compiled network a card's slices of a whole checkpoint, a tensor at a time, by the layout of each."""
    config: GLMConfig = network.config
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    with open_checkpoint(path) as reader:
        for stored, joint in load_parameters(reader, config, config.param_init_type):
            for name, whole in split_joint(stored, joint, config):
                if name not in layouts:
                    continue
                value = _cut(whole, layouts[name], rank)
                if config.param_init_type == "bfloat16":  # bit patterns: NumPy has no type for them
                    value = (value.astype(np.uint32) << 16).view(np.float32)
                parameter = parameters[name]
                parameter.set_data(Tensor(value, parameter.dtype), slice_shape=True)


def stored_shape(layout: tuple) -> tuple[int, ...]:
    """The shape that a card stores of a parameter, from MindSpore's layout."""
    shape = list(layout[2])
    if layout[5]:
        shape[0] //= get_group_size(layout[5])
    return tuple(shape)


def _cut(whole: np.ndarray, layout: tuple, rank: int) -> np.ndarray:
    """A card's slice of a whole array: by device matrix and tensor map, then by the group of the sharded optimizer."""
    devices, tensor_map, group = layout[0], layout[1], layout[5]
    axes = tuple(() if mapped == -1 else (len(devices) - 1 - mapped,) for mapped in tensor_map)
    pieces = get_group_size(group) if group else 1
    return np.ascontiguousarray(whole[Layout(tuple(devices), axes, pieces).region(whole.shape, rank)])
