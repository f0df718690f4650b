"""The checkpoints of a training run: found, written as a whole or not at all, restored, removed when old."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mindspore import Parameter, nn
from mindspore.nn import Optimizer

from glm_ms.convert.adapter_files import CONFIG, OPTIMIZER
from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.engine.checkpoints.manifest import write_manifest
from glm_ms.engine.checkpoints.parameters_file import read_parameters, write_parameters
from glm_ms.generation import GLMForCausalLM
from glm_ms.model.config import GLMConfig
from glm_ms.settings import Settings
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import CHECKPOINTS, list_checkpoints, resolve_checkpoint, step_folder

WEIGHTS = "model.safetensors"


class State(Protocol):
    """Everything in memory that a resumed run needs."""

    def write(self, folder: Path) -> None:
        """Writes all files of the state into an empty folder, a tensor at a time."""

    def restore(self, folder: Path) -> None:
        """Loads what `write` has written; raises CheckpointError if a file is damaged or does not fit this run."""


class Checkpoints(ABC):
    """The checkpoints of this rank.

    Args:
        settings: of the run.
        folder: output folder that has the checkpoints of this rank.
        writes: whether this rank writes checkpoints, and verifies the one that it resumes from.
        keep_max: number of newest checkpoints that stay.

    Attributes:
        state: what is saved and restored; set when network and training step are built.
    """

    state: State

    def __init__(self, settings: Settings, folder: Path, writes: bool, keep_max: int) -> None:
        self.settings, self.folder, self.writes, self.keep_max = settings, folder, writes, keep_max

    @abstractmethod
    def find(self) -> Path | None:
        """The checkpoint to resume from; None for a new run.

        Raises:
            CheckpointError: `resume_training` is set and there is no checkpoint.
        """

    def write(self, step: int, place: tuple[int, int], position: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Writes the checkpoint of a step.

        The folder gets its name when everything in it is on disk; a process killed while writing leaves nothing
        under that name.

        Args:
            step: updates made.
            place, position, best: see `write_manifest`.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        folder = step_folder(self.folder, step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(folder, folder=True, overwrite=True) as partial:
            self.state.write(partial)
            write_manifest(partial, step, place, position, best, self.settings.context.device_target)
        _sync_folder(folder.parent)  # before older ones are removed, also against a power cut

    def restore(self, checkpoint: Path) -> None:
        """Loads a checkpoint into the state; raises CheckpointError as `State.restore`."""
        self.state.restore(checkpoint)

    def remove_old(self, kept: Collection[int] = ()) -> None:
        """Removes all checkpoints except the newest `keep_max` and those of the steps `kept`."""
        for hidden in (self.folder / CHECKPOINTS).glob(".step_*.old"):
            shutil.rmtree(hidden, ignore_errors=True)
        for step, old in list_checkpoints(self.folder)[: -self.keep_max]:
            if step in kept:
                continue
            # Renamed first: a process killed during the removal must not leave half a checkpoint.
            doomed = old.with_name(f".{old.name}.old")
            old.rename(doomed)
            shutil.rmtree(doomed)


class WholeCheckpoints(Checkpoints):
    """Checkpoints of a run in which every rank has the whole network; the first rank writes them.

    Args:
        settings: of the run.
        writes: this is the first rank.
    """

    def __init__(self, settings: Settings, writes: bool) -> None:
        super().__init__(settings, Path(settings.output_dir), writes, settings.checkpoint.keep_max)

    def find(self) -> Path | None:
        resume = self.settings.resume_training
        if resume is False:
            return None
        if isinstance(resume, str):
            return resolve_checkpoint(resume)
        found = list_checkpoints(self.folder)
        if not found:
            raise CheckpointError(
                f"{self.settings.where('resume_training')}: resume_training: {self.folder / CHECKPOINTS} has no "
                "checkpoint; give the output_dir of the run to resume, or leave resume_training out to start a new one"
            )
        return found[-1][1]


@dataclass(frozen=True)
class WholeState:
    """Network or adapter, optimizer and loss scale of a run in which every rank has the whole network.

    A run that trains all weights saves them, one that trains an adapter saves only the adapter.

    Args:
        model: network, with the adapter if the run trains one.
        step: the training step, with its optimizer and loss scale.
        base_model: where the base weights under an adapter came from, noted in its files.
        restores_weights: `restore` also loads full weights; False if the network was built with them.
    """

    model: GLMForCausalLM
    step: nn.Cell
    base_model: str
    restores_weights: bool

    def write(self, folder: Path) -> None:
        model = self.model
        if model.adapter is None:
            write_parameters(folder / WEIGHTS, model.parameters().values(), model.config.param_init_type)
            write_config(folder, model.config)
        else:
            model.adapter.save(folder, self.base_model)
        write_parameters(folder / OPTIMIZER, optimizer_state(self.step, model.network), "float32")

    def restore(self, folder: Path) -> None:
        if self.model.adapter is not None:
            self.model.adapter.restore(folder)
        elif self.restores_weights:
            with open_checkpoint(folder / WEIGHTS) as reader:
                self.model.load_parameters(load_parameters(reader, self.model.config, "float32"))
        read_parameters(folder / OPTIMIZER, optimizer_state(self.step, self.model.network))


def optimizer_state(step: nn.Cell, network: nn.Cell) -> list[Parameter]:
    """What the optimizer of a training step has besides the parameters of the network, and the loss scale."""
    shared = {id(parameter) for parameter in network.get_parameters()}
    optimizer: Optimizer = step.optimizer
    own = [parameter for parameter in optimizer.get_parameters() if id(parameter) not in shared]
    return own + ([] if step.loss_scale is None else step.loss_scale.parameters())


def write_config(folder: Path, config: GLMConfig) -> None:
    """Writes the `config.json` that describes the weights of a folder."""
    (folder / CONFIG).write_text(json.dumps(config.to_hf_dict(), indent=2), encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
