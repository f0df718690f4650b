"""GGUF files of llama.cpp, version 3: the container and the element types, written tensor by tensor.

Source: the specification of GGUF (ggml-org/ggml, docs/gguf.md) and the block layouts of `ggml-quants.c`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np

from glm_ms.ops.packing import float32_to_bfloat16
from glm_ms.storage.errors import CheckpointError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32  # elements that share a scale in the quantised types
_ROWS_AT_A_TIME = 256

# A value of the metadata. int is written as uint32, float as float32; lists have elements of one type.
Value = Union[bool, int, float, str, Sequence[int], Sequence[float], Sequence[str]]
# Numbers of the types of metadata in the file.
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class GGUFType:
    """One element type.

    Attributes:
        number: of the type in the description of a tensor.
        file_type: `general.file_type` of a file whose matrices have this type.
        block, bytes: elements of a block, and bytes of one.
        encode: float32 [rows, n] -> uint8 [rows, bytes of a row]; n is a multiple of `block`.
    """

    number: int
    file_type: int
    block: int
    bytes: int
    encode: Callable[[np.ndarray], np.ndarray]

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor."""
        return math.prod(shape) // self.block * self.bytes


def _float32(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows, "<f4").view(np.uint8)


def _float16(rows: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = rows.astype("<f2")
    if np.isinf(half).any():
        raise CheckpointError("a value overflows float16 (largest 65504)")
    return half.view(np.uint8)


def _bfloat16(rows: np.ndarray) -> np.ndarray:
    return float32_to_bfloat16(rows).astype("<u2").view(np.uint8)


def _scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales float32 [..., 1] of blocks: their two bytes as float16, and their inverse, 0 for a scale of 0."""
    stored = _float16(values)
    with np.errstate(divide="ignore"):
        return stored, np.where(values == 0, np.float32(0), np.float32(1) / values)


def _q8_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of a float16 scale and 32 int8: largest magnitude 127, halves away from zero."""
    blocks = np.ascontiguousarray(rows, np.float32).reshape(len(rows), -1, BLOCK)
    scales, inverse = _scales(np.abs(blocks).max(-1, keepdims=True) / np.float32(127))
    scaled = blocks * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate((scales, codes.view(np.uint8)), -1).reshape(len(rows), -1)


def _q4_0(rows: np.ndarray) -> np.ndarray:
    """Blocks of a float16 scale and 32 values of 4 bits, 8 is zero.

    The value of the largest magnitude becomes 0. Byte i of a block has value i low and value i + 16 high.
    """
    blocks = np.ascontiguousarray(rows, np.float32).reshape(len(rows), -1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales, inverse = _scales(largest / np.float32(-8))
    codes = np.minimum(np.trunc(blocks * inverse + np.float32(8.5)), 15).astype(np.uint8)
    packed = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    return np.concatenate((scales, packed), -1).reshape(len(rows), -1)


TYPES: dict[str, GGUFType] = {
    "F32": GGUFType(0, 0, 1, 4, _float32),
    "F16": GGUFType(1, 1, 1, 2, _float16),
    "BF16": GGUFType(30, 32, 1, 2, _bfloat16),
    "Q8_0": GGUFType(8, 7, BLOCK, 2 + BLOCK, _q8_0),
    "Q4_0": GGUFType(2, 2, BLOCK, 2 + BLOCK // 2, _q4_0),
}


def encode(array: np.ndarray, kind: str) -> np.ndarray:
    """A float32 tensor [..., n] as bytes, uint8 [bytes]; n is a multiple of the block of `kind`.

    Raises CheckpointError if a value is outside the range of the type.
    """
    rows = array.reshape(-1, array.shape[-1])
    parts = [rows[start : start + _ROWS_AT_A_TIME] for start in range(0, len(rows), _ROWS_AT_A_TIME)]
    return np.concatenate([TYPES[kind].encode(part).reshape(-1) for part in parts])


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[Sequence[int], str]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a file.

    Args:
        metadata: key -> value, `general.architecture` first.
        tensors: name -> shape, as NumPy writes it, and key of `TYPES`.
        arrays: (name, float32 array) of every tensor in the order of `tensors`, consumed one by one.

    Raises:
        CheckpointError: an array differs from `tensors`, or overflows its type.
    """
    with open(path, "wb") as file:
        file.write(_header(metadata, tensors))
        _pad(file)
        pending = iter(tensors.items())
        for name, array in arrays:
            expected, (shape, kind) = next(pending, ("the end", ((), "F32")))
            if name != expected or array.shape != tuple(shape):
                raise CheckpointError(f"{name} {list(array.shape)}: expected {expected} {list(shape)}")
            try:
                encode(array, kind).tofile(file)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}; choose another type") from None
            _pad(file)
            del array  # so that memory has one tensor, not two, while the next is read
        absent = next(pending, None)
        if absent is not None:
            raise CheckpointError(f"{absent[0]}: expected, but missing")


def file_size(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Sequence[int], str]]) -> int:
    """Bytes of the file that `write_gguf` writes."""
    parts = [len(_header(metadata, tensors)), *(TYPES[kind].size(shape) for shape, kind in tensors.values())]
    return sum(map(_aligned, parts))


def _header(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Sequence[int], str]]) -> bytes:
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        # Dimensions begin with that of adjacent elements.
        out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        out += struct.pack("<IQ", TYPES[kind].number, offset)
        offset += _aligned(TYPES[kind].size(shape))
    return bytes(out)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(value: Value) -> bytes:
    """The number of the type of a value, and the value."""
    if isinstance(value, (list, tuple)):
        number = _kind(value[0]) if value else _INT32
        number = _INT32 if number == _UINT32 else number
        return struct.pack("<IIQ", _ARRAY, number, len(value)) + b"".join(_plain(item, number) for item in value)
    number = _kind(value)
    return struct.pack("<I", number) + _plain(value, number)


def _kind(value: Any) -> int:
    return {bool: _BOOL, int: _UINT32, float: _FLOAT32, str: _STRING}[type(value)]


def _plain(value: Any, number: int) -> bytes:
    if number == _STRING:
        return _string(value)
    return struct.pack({_BOOL: "<?", _UINT32: "<I", _INT32: "<i", _FLOAT32: "<f"}[number], value)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))
