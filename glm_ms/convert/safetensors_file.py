"""The safetensors format, read and written tensor by tensor.

Layout (https://github.com/huggingface/safetensors): the length of the header as a little-endian uint64, the header as
JSON (name -> dtype, shape, data_offsets; `__metadata__` is free text), then the content of the tensors. The package
`safetensors` is not used: it has the whole file in memory on writing, and no bfloat16 for NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glm_ms.convert.dtypes import DTYPES, FROM_SAFETENSORS
from glm_ms.convert.tensor_file import TensorFile, TensorInfo, describe_content
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.readers import decode_text, parse_object

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the limit of the package safetensors
_ALIGNMENT = 8


class SafetensorsFile(TensorFile):
    """Reads a `.safetensors` file; raises CheckpointError if the header is none or broken, or the file truncated."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _read_header(path, file, size)
        metadata = header.pop("__metadata__", None)
        if isinstance(metadata, dict):
            self.metadata = {key: str(value) for key, value in metadata.items()}
        found = []
        for name, value in header.items():
            info, begin = _entry(path, name, value)
            found.append((begin, name, info))
        end = start
        for begin, name, info in sorted(found, key=lambda item: (item[0], item[2].nbytes)):
            if start + begin != end:
                raise CheckpointError(f"{path}: {name}: data offsets leave a gap or overlap")
            self.entries[name] = info
            self.spans[name] = [(end, info.nbytes)]
            end += info.nbytes
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: {end} bytes according to the header, the file has {size}; fetch it again"
            )
        if end < size:
            raise CheckpointError(f"{path}: {size - end} bytes too many after the tensors")


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, arrays: Iterator[np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes a new file, with one tensor in memory at a time; raises OSError if it cannot be written.

    Args:
        shapes: name -> shape, in the order of `arrays`.
        dtype: element type of all tensors, a name of `dtypes.DTYPES`.
        arrays: gives at least one array per name, in the storage type of `dtype`.
        metadata: free text of the header, such as {"format": "pt"}.
    """
    with path.open("xb") as file:
        write_header(file, {name: TensorInfo(shape, dtype) for name, shape in shapes.items()}, metadata)
        for _ in shapes:  # `arrays` may continue with those of the next shard
            write_tensor(file, next(arrays))


def write_header(
    file: BinaryIO, tensors: dict[str, TensorInfo], metadata: dict[str, str], alignment: int = _ALIGNMENT
) -> None:
    """Writes the start of a file whose tensors follow in the order of `tensors`, each by `write_tensor`; the first one
    begins at a multiple of `alignment` bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, info in tensors.items():
        offsets = [position, position + info.nbytes]
        header[name] = {"dtype": DTYPES[info.dtype].safetensors, "shape": list(info.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(_LENGTH_BYTES + len(text)) % alignment)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def write_tensor(file: BinaryIO, array: np.ndarray) -> None:
    """Appends the content of one tensor, given in the storage type of its dtype."""
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and the offset at which the content of the tensors begins."""
    head = file.read(64)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise CheckpointError(f"{path}: not a safetensors file: it is {describe_content(head)}")
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path}: a header of {length} bytes, more than the {_MAX_HEADER} that the format allows; the file is "
            "damaged, fetch it again"
        )
    if _LENGTH_BYTES + length > size:
        raise CheckpointError(f"{path}: truncated inside the header; fetch it again")
    file.seek(_LENGTH_BYTES)
    text = decode_text(file.read(length), path, CheckpointError)
    return parse_object(text, f"{path}: header", CheckpointError), _LENGTH_BYTES + length


def _entry(path: Path, name: str, value: Any) -> tuple[TensorInfo, int]:
    """Checks one entry of the header: shape and type, and the first byte."""
    numbers: list[Any] = []
    if isinstance(value, dict) and isinstance(value.get("shape"), list) and isinstance(value.get("data_offsets"), list):
        numbers = [*value["shape"], *value["data_offsets"]]
    if len(numbers) < 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: {name}: broken header entry {value!r}")
    *shape, begin, end = numbers
    if len(shape) != len(value["shape"]) or str(value.get("dtype")) not in FROM_SAFETENSORS:
        raise CheckpointError(
            f"{path}: {name}: type {value.get('dtype')!r} cannot be read; known: {', '.join(FROM_SAFETENSORS)}"
        )
    info = TensorInfo(tuple(shape), FROM_SAFETENSORS[value["dtype"]])
    if end - begin != info.nbytes:
        raise CheckpointError(f"{path}: {name}: size in bytes does not match shape and type")
    return info, begin
