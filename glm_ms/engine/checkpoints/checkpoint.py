"""Training checkpoints: what is trained, optimizer state and position, saved as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.nn import Optimizer

from glm_ms.convert import CheckpointError, convert_dtype, load_parameters, open_checkpoint
from glm_ms.convert.adapter_files import CONFIG, OPTIMIZER
from glm_ms.convert.safetensors_file import SafetensorsFile, write_safetensors
from glm_ms.engine.step.loss_scale import LossScale
from glm_ms.generation import GLMForCausalLM
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.run_folder import CHECKPOINTS, list_checkpoints, step_folder

WEIGHTS = "model.safetensors"
_NO_METADATA: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class TrainingState:
    """Everything in memory that a run goes on from.

    A run that trains all weights leaves them in its checkpoints, one that trains an adapter the adapter alone.

    Args:
        model: network, and adapter if that is what is trained.
        optimizer: its moments and its counter of updates.
        loss_scale: scale and counters, None without loss scaling.
        base_model: where the base weights under an adapter came from, noted in its files.
    """

    model: GLMForCausalLM
    optimizer: Optimizer
    loss_scale: LossScale | None = None
    base_model: str = ""

    def write(self, folder: Path) -> None:
        """Writes all files of the state into an empty folder, a tensor at a time."""
        model = self.model
        if model.adapter is None:
            write_parameters(folder / WEIGHTS, model.parameters().values(), model.config.param_init_type)
            text = json.dumps(model.config.to_hf_dict(), indent=2)
            (folder / CONFIG).write_text(text, encoding="utf-8")
        else:
            model.adapter.save(folder, self.base_model)
        write_parameters(folder / OPTIMIZER, self._optimizer_state(), "float32")

    def restore(self, folder: Path, weights: bool) -> None:
        """Loads what `write` has written.

        Args:
            folder: the checkpoint.
            weights: also full weights; a resumed run is mostly built with those of the checkpoint.

        Raises:
            CheckpointError: a file is damaged, or its tensors are not those of this run.
        """
        if self.model.adapter is not None:
            self.model.adapter.restore(folder)
        elif weights:
            with open_checkpoint(folder / WEIGHTS) as reader:
                self.model.load_parameters(load_parameters(reader, self.model.config, "float32"))
        read_parameters(folder / OPTIMIZER, self._optimizer_state())

    def _optimizer_state(self) -> list[Parameter]:
        """What the optimizer owns besides the parameters it trains, and the state of the loss scale."""
        trained = {id(parameter) for parameter in self.model.network.get_parameters()}
        own = [parameter for parameter in self.optimizer.get_parameters() if id(parameter) not in trained]
        return own + ([] if self.loss_scale is None else self.loss_scale.parameters())


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Writes the checkpoint of a step.

    The folder gets its name when everything in it is on disk; a process killed while writing leaves nothing
    under that name.

    Args:
        output_dir: folder of the run.
        step: updates made.
        write: fills an empty folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = step_folder(output_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder, folder=True, overwrite=True) as partial:
        write(partial)
    _sync_folder(folder.parent)  # before older ones are removed, also against a power cut
    return folder


def remove_old_checkpoints(output_dir: Path, keep_max: int, kept: Collection[int] = ()) -> None:
    """Removes all checkpoints but the newest `keep_max` and those of the steps `kept`."""
    for hidden in (output_dir / CHECKPOINTS).glob(".step_*.old"):
        shutil.rmtree(hidden, ignore_errors=True)
    for step, old in list_checkpoints(output_dir)[:-keep_max]:
        if step in kept:
            continue
        doomed = old.with_name(f".{old.name}.old")  # a removal cut short must not leave half a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)


def _assign(parameter: Parameter, value: np.ndarray, path: Path) -> None:
    if tuple(value.shape) != tuple(parameter.shape):
        raise CheckpointError(
            f"{path}: {parameter.name} has shape {tuple(value.shape)}, this run needs {tuple(parameter.shape)}"
        )
    parameter.set_data(Tensor(value, parameter.dtype))


def read_parameters(
    path: Path,
    parameters: Iterable[Parameter],
    prefix: str = "",
    metadata: Mapping[str, str] = _NO_METADATA,
) -> None:
    """Overwrites parameters with the tensors of their names in a file.

    Args:
        path: a .safetensors file.
        parameters: of unequal names.
        prefix: of the names in the file.
        metadata: what its header must say, such as whose slices these are.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks one, or has another shape, or is another card's.
    """
    try:
        file = SafetensorsFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    for key, value in metadata.items():
        if file.metadata.get(key) != value:
            raise CheckpointError(
                f"{path}: its header says {key} {file.metadata.get(key)}, but it lies where that of {key} {value} "
                "belongs; the files were swapped or are of another run"
            )
    for parameter in parameters:
        name = f"{prefix}{parameter.name}"
        if name not in file.entries:
            raise CheckpointError(f"{path}: has no tensor {name}; was another optimizer used?")
        _assign(parameter, file.read(name), path)
    file.release()


def write_parameters(
    path: Path,
    parameters: Iterable[Parameter],
    dtype: str,
    prefix: str = "",
    metadata: Mapping[str, str] = _NO_METADATA,
) -> None:
    """Writes parameters under their names, a tensor at a time.

    Args:
        path: a .safetensors file.
        parameters: of unequal names.
        dtype: element type of the file.
        prefix: of the names in the file.
        metadata: for its header.
    """
    parameters = list(parameters)

    def arrays() -> Iterator[np.ndarray]:
        for parameter in parameters:
            # Through float32, which holds float16, bfloat16 and counters of updates (below 2^24) exactly.
            value = parameter.value().astype(ms.float32).asnumpy()
            yield convert_dtype(value, "float32", dtype, parameter.name)

    shapes = {f"{prefix}{parameter.name}": tuple(parameter.shape) for parameter in parameters}
    write_safetensors(path, shapes, dtype, arrays(), {"format": "np", **metadata})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
