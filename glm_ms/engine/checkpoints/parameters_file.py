"""Parameters in `.safetensors` files, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from glm_ms.convert.dtypes import convert_dtype
from glm_ms.convert.safetensors_file import SafetensorsFile, write_safetensors
from glm_ms.storage.errors import CheckpointError

_NO_METADATA: Mapping[str, str] = MappingProxyType({})


def read_parameters(
    path: Path, parameters: Iterable[Parameter], prefix: str = "", metadata: Mapping[str, str] = _NO_METADATA
) -> None:
    """Overwrites parameters with the tensors of their names in a file.

    Args:
        path: a .safetensors file.
        parameters: with different names.
        prefix: of the names in the file.
        metadata: entries that the header of the file must have, such as the rank of a slice.

    Raises:
        CheckpointError: the file is missing or damaged, has no tensor of a name or one of another shape, or another
            header.
    """
    try:
        file = SafetensorsFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    for key, value in metadata.items():
        if file.metadata.get(key) != value:
            raise CheckpointError(
                f"{path}: its header says {key} {file.metadata.get(key)}, but the file is in the place of {key} "
                f"{value}; the files were swapped or are of another run"
            )
    for parameter in parameters:
        name = f"{prefix}{parameter.name}"
        if name not in file.entries:
            raise CheckpointError(f"{path}: has no tensor {name}; was another optimizer used?")
        _assign(parameter, file.read(name), path)
    file.release()


def _assign(parameter: Parameter, value: np.ndarray, path: Path) -> None:
    if tuple(value.shape) != tuple(parameter.shape):
        raise CheckpointError(
            f"{path}: {parameter.name} has shape {tuple(value.shape)}, this run needs {tuple(parameter.shape)}"
        )
    parameter.set_data(Tensor(value, parameter.dtype))


def write_parameters(
    path: Path,
    parameters: Iterable[Parameter],
    dtype: str,
    prefix: str = "",
    metadata: Mapping[str, str] = _NO_METADATA,
) -> None:
    """Writes parameters under their names.

    Args:
        path: a .safetensors file.
        parameters: with different names.
        dtype: element type of the file.
        prefix: of the names in the file.
        metadata: for its header.
    """
    parameters = list(parameters)

    def arrays() -> Iterator[np.ndarray]:
        for parameter in parameters:
            # float32 represents float16, bfloat16 and counters of updates (below 2^24) exactly.
            value = parameter.value().astype(ms.float32).asnumpy()
            yield convert_dtype(value, "float32", dtype, parameter.name)

    shapes = {f"{prefix}{parameter.name}": tuple(parameter.shape) for parameter in parameters}
    write_safetensors(path, shapes, dtype, arrays(), {"format": "np", **metadata})
