"""Training checkpoints: weights, optimizer state and position, saved as a whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from glm_ms.convert import CheckpointError, convert_dtype
from glm_ms.convert.atomic import atomic_output
from glm_ms.convert.reader import open_checkpoint
from glm_ms.convert.run_folder import list_checkpoints, step_folder
from glm_ms.convert.safetensors_file import SafetensorsFile, write_safetensors
from glm_ms.model.config import GLMConfig

WEIGHTS, OPTIMIZER, STATE, CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.json"


def save_checkpoint(
    output_dir: Path,
    step: int,
    config: GLMConfig,
    weights: Iterable[Parameter],
    optimizer_state: Iterable[Parameter],
    state: dict[str, Any],
    keep_max: int,
) -> Path:
    """Writes the checkpoint of a step and removes the oldest ones.

    The folder gets its name when everything in it is on disk; a process killed while writing leaves nothing
    under that name.

    Args:
        output_dir: folder of the run.
        step: updates made.
        config: written as config.json, so that the folder loads like a Hugging Face folder.
        weights, optimizer_state: parameters, written one at a time in their own types.
        state: what else is needed to go on; JSON.
        keep_max: checkpoints to keep, this one included.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = step_folder(output_dir, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder, folder=True, overwrite=True) as partial:
        _write_parameters(partial / WEIGHTS, weights, config.param_init_type)
        _write_parameters(partial / OPTIMIZER, optimizer_state, "float32")
        (partial / CONFIG).write_text(json.dumps(config.to_hf_dict(), indent=2), encoding="utf-8")
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
    for hidden in folder.parent.glob(".step_*.old"):
        shutil.rmtree(hidden, ignore_errors=True)
    for _, old in list_checkpoints(output_dir)[:-keep_max]:
        doomed = old.with_name(f".{old.name}.old")  # a removal cut short must not leave half a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` of a checkpoint, with its `step`.

    Raises:
        CheckpointError: not a checkpoint of a training run.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {STATE} cannot be read ({error}); training resumes from a checkpoint folder of a run only"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder / STATE}: has no step")
    return state


def check_files(folder: Path) -> None:
    """Reads the headers of both tensor files, so that a damaged checkpoint shows before anything is compiled.

    Raises:
        CheckpointError: a file is missing or damaged; it names the other checkpoints of the run.
    """
    try:
        for name in (WEIGHTS, OPTIMIZER):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: missing")
            SafetensorsFile(folder / name).release()
    except CheckpointError as error:
        others = [str(path) for _, path in list_checkpoints(folder.parent.parent) if path != folder]
        remedy = f"; resume from {others[-1]} instead (resume_training={others[-1]})" if others else ""
        raise CheckpointError(f"{error}{remedy}") from None


def restore(folder: Path, weights: Iterable[Parameter], optimizer_state: Iterable[Parameter]) -> None:
    """Loads weights and optimizer state into existing parameters.

    Raises:
        CheckpointError: a file is damaged, or its tensors are not those of this run.
    """
    with open_checkpoint(folder / WEIGHTS) as reader:
        for parameter in weights:
            if parameter.name not in reader.names():
                raise CheckpointError(f"{folder / WEIGHTS}: has no tensor {parameter.name}")
            _assign(parameter, reader.read(parameter.name, "float32"), folder / WEIGHTS)
    path = folder / OPTIMIZER
    file = SafetensorsFile(path)
    for parameter in optimizer_state:
        if parameter.name not in file.entries:
            raise CheckpointError(f"{path}: has no tensor {parameter.name}; was another optimizer used?")
        _assign(parameter, file.read(parameter.name), path)
    file.release()


def _assign(parameter: Parameter, value: np.ndarray, path: Path) -> None:
    if tuple(value.shape) != tuple(parameter.shape):
        raise CheckpointError(
            f"{path}: {parameter.name} has shape {tuple(value.shape)}, this run needs {tuple(parameter.shape)}"
        )
    parameter.set_data(Tensor(value, parameter.dtype))


def _write_parameters(path: Path, parameters: Iterable[Parameter], dtype: str) -> None:
    parameters = list(parameters)

    def arrays() -> Iterator[np.ndarray]:
        for parameter in parameters:
            # Through float32, which holds float16, bfloat16 and step counters exactly.
            value = parameter.value().astype(ms.float32).asnumpy()
            yield convert_dtype(value, "float32", dtype, parameter.name)

    shapes = {parameter.name: tuple(parameter.shape) for parameter in parameters}
    write_safetensors(path, shapes, dtype, arrays(), {"format": "np"})
