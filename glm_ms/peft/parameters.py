"""The tensors of an adapter: read from its file, and into its parameters, all or an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from glm_ms.convert.reader import open_checkpoint
from glm_ms.peft.errors import AdapterError
from glm_ms.storage.errors import capped


def stored_tensors(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Name -> float32 array of every tensor in a file, names without `prefix`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with open_checkpoint(path) as reader:
        return {name.removeprefix(prefix): reader.read(name, "float32") for name in reader.names()}


def assign_all(parameters: Mapping[str, Parameter], tensors: Mapping[str, np.ndarray], source: Path) -> None:
    """Overwrites every parameter with the tensor of its name.

    Args:
        parameters: name -> float32 parameter.
        tensors: name -> float32 array.
        source: where the tensors come from, for errors.

    Raises:
        AdapterError: a tensor is missing, is not wanted, has another shape, or holds NaN or infinity.
    """
    problems = [f"{name}: missing" for name in parameters if name not in tensors]
    for name, value in tensors.items():
        if name not in parameters:
            problems.append(f"{name}: not expected here")
        elif tuple(value.shape) != tuple(parameters[name].shape):
            wanted = list(parameters[name].shape)
            problems.append(f"{name}: shape {list(value.shape)}, this network needs {wanted}")
        elif not np.isfinite(value).all():
            problems.append(f"{name}: holds NaN or infinity")
    if problems:
        separator = "\n    "
        raise AdapterError(
            f"{source}: the adapter does not fit this network; was it made for another base?"
            f"{separator}{capped(problems, separator)}"
        )
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(np.ascontiguousarray(tensors[name], np.float32)))
