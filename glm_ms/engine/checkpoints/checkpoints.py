"""The checkpoints of a training run: found, written as a whole or not at all, restored, removed when old; the best."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn import Optimizer

from glm_ms.convert.adapter_files import CONFIG
from glm_ms.convert.dtypes import convert_dtype
from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.convert.safetensors_file import SafetensorsFile, write_safetensors
from glm_ms.engine.checkpoints.manifest import write_manifest
from glm_ms.engine.process import Say
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import HIGHER, METRICS, metric_of
from glm_ms.model.config import GLMConfig
from glm_ms.settings import Settings
from glm_ms.storage.atomic import atomic_output, remove_folder, replace_text, sync
from glm_ms.storage.errors import CheckpointError, WriteError, not_written
from glm_ms.storage.run_folder import (
    CHECKPOINTS,
    OPTIMIZER,
    best_file,
    list_checkpoints,
    resolve_checkpoint,
    step_folder,
)

WEIGHTS = "model.safetensors"
Metadata = Mapping[str, str]


class State(Protocol):
    """Everything in memory that a resumed run needs."""

    def write(self, folder: Path) -> None:
        """Writes all files of the state into an empty folder, a tensor at a time."""

    def restore(self, folder: Path) -> None:
        """Loads what `write` has written; raises CheckpointError if a file is damaged or does not fit this run."""


class Checkpoints(ABC):
    """The checkpoints of this rank.

    Attributes:
        folder: output folder that has them.
        writes: whether this rank writes checkpoints, and verifies the one that it resumes from.
        keep_max: number of newest checkpoints that stay.
        state: what is saved and restored; set when network and training step are built.
    """

    state: State

    def __init__(self, settings: Settings, folder: Path, writes: bool, keep_max: int) -> None:
        self.settings, self.folder, self.writes, self.keep_max = settings, folder, writes, keep_max

    @abstractmethod
    def find(self) -> Path | None:
        """The checkpoint to resume from; None for a new run. Raises CheckpointError if `resume_training` finds none."""

    def write(self, step: int, place: tuple[int, int], position: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Writes the checkpoint after `step` updates; the other values are those of `write_manifest`.

        The folder gets its name when everything in it is on disk; a process killed while writing leaves nothing
        under that name. Raises CheckpointError if the folder cannot be written; WriteError if the output folder has
        been removed.
        """
        folder = step_folder(self.folder, step)
        try:
            folder.parent.mkdir(exist_ok=True)  # without its parents: an output folder that is gone must be noticed
        except OSError as error:
            raise WriteError(not_written(folder.parent, error)) from error
        with atomic_output(folder, folder=True, overwrite=True) as partial:
            self.state.write(partial)
            write_manifest(partial, step, place, position, best, self.settings.context.device_target)
        sync(folder.parent)  # before older ones are removed, also against a power cut

    def restore(self, checkpoint: Path) -> None:
        """Loads a checkpoint into the state; raises CheckpointError as `State.restore`."""
        self.state.restore(checkpoint)

    def remove_old(self, kept: Collection[int] = ()) -> None:
        """Removes all checkpoints except the newest `keep_max` and those of the steps `kept`."""
        for step, old in list_checkpoints(self.folder)[: -self.keep_max]:
            if step not in kept:
                remove_folder(old)


class WholeCheckpoints(Checkpoints):
    """Checkpoints of a run in which every rank has the whole network; the first rank writes them."""

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

    Attributes:
        model: with the adapter if the run trains one; then only the adapter is saved.
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


class BestEvaluation:
    """Which evaluation of a run was the best so far; its checkpoint is kept besides the newest ones.

    The record is written into the manifest of every checkpoint, from which a resumed run reads it, and into
    `checkpoint/best.json`, to which the path `OUTPUT_DIR/checkpoint/best` refers.

    Args:
        metric: name of the score; None: nothing is kept.
        known: the record, {"step", "metric", "value"}, of the checkpoint that the run resumes from. It is ignored, with
            a line to `say`, if it has another score, or if its checkpoint is not in `output_dir`.
    """

    def __init__(self, output_dir: Path, metric: str | None, known: Mapping[str, Any] | None, say: Say) -> None:
        self._output_dir, self.metric = output_dir, metric
        self.record: dict[str, Any] | None = None
        if not known or metric is None:
            return
        if known["metric"] != metric:
            say(f"the best evaluation of the checkpoint is ignored: it was measured by {known['metric']}")
        elif not step_folder(output_dir, known["step"]).is_dir():
            say(
                f"the best evaluation of the checkpoint is ignored: its checkpoint, step {known['step']}, is not in "
                f"{output_dir}"
            )
        else:
            self.record = dict(known)

    @property
    def steps(self) -> tuple[int, ...]:
        """The step whose checkpoint is kept, if any."""
        return () if self.record is None else (self.record["step"],)

    def improves(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Whether an evaluation is better than all before; if so, it becomes the best."""
        value = None if self.metric is None else scores.get(self.metric)
        if self.metric is None or value is None or not math.isfinite(value):
            return False
        if self.record is not None:
            gain = value - self.record["value"]
            if (gain if METRICS[metric_of(self.metric)].better[self.metric] == HIGHER else -gain) <= 0:
                return False
        self.record = {"step": step, "metric": self.metric, "value": value}
        return True

    def write(self) -> None:
        """Updates `best.json`; call it after the checkpoint of the record is written."""
        path = best_file(self._output_dir)
        if self.record is None:
            path.unlink(missing_ok=True)
        else:
            replace_text(path, json.dumps(self.record) + "\n")


def optimizer_state(step: nn.Cell, network: nn.Cell) -> list[Parameter]:
    """What the optimizer of a training step has besides the parameters of the network, and the loss scale."""
    shared = {id(parameter) for parameter in network.get_parameters()}
    optimizer: Optimizer = step.optimizer
    own = [parameter for parameter in optimizer.get_parameters() if id(parameter) not in shared]
    return own + ([] if step.loss_scale is None else step.loss_scale.parameters())


def write_config(folder: Path, config: GLMConfig) -> None:
    """Writes the `config.json` that describes the weights of a folder."""
    (folder / CONFIG).write_text(json.dumps(config.to_hf_dict(), indent=2), encoding="utf-8")


def write_parameters(
    path: Path, parameters: Iterable[Parameter], dtype: str, prefix: str = "", metadata: Metadata | None = None
) -> None:
    """Writes parameters to a .safetensors file under their names after `prefix`, a tensor at a time.

    `dtype` is the element type of the file, `metadata` goes into its header.
    """
    parameters = list(parameters)

    def arrays() -> Iterator[np.ndarray]:
        for parameter in parameters:
            # float32 represents float16, bfloat16 and counters of updates (below 2^24) exactly.
            value = parameter.value().astype(ms.float32).asnumpy()
            yield convert_dtype(value, "float32", dtype, parameter.name)

    shapes = {f"{prefix}{parameter.name}": tuple(parameter.shape) for parameter in parameters}
    write_safetensors(path, shapes, dtype, arrays(), {"format": "np", **(metadata or {})})


def read_parameters(
    path: Path, parameters: Iterable[Parameter], prefix: str = "", metadata: Metadata | None = None
) -> None:
    """Overwrites parameters with the tensors of a file of `write_parameters`, a tensor at a time.

    Raises:
        CheckpointError: the file is missing or damaged, has no tensor of a name or one of another shape, or its header
            has not all of `metadata`.
    """
    try:
        file = SafetensorsFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    for key, value in (metadata or {}).items():
        if file.metadata.get(key) != value:
            raise CheckpointError(
                f"{path}: its header says {key} {file.metadata.get(key)}, but the file is in the place of {key} "
                f"{value}; the files were swapped or are of another run"
            )
    for parameter in parameters:
        name, shape = f"{prefix}{parameter.name}", tuple(parameter.shape)
        if name not in file.entries:
            raise CheckpointError(f"{path}: has no tensor {name}; was another optimizer used?")
        array = file.read(name)
        if array.shape != shape:
            raise CheckpointError(f"{path}: {parameter.name} has shape {array.shape}, this run needs {shape}")
        parameter.set_data(Tensor(array, parameter.dtype))
    file.release()
