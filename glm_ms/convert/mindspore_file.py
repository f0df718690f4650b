"""The MindSpore checkpoint format (`.ckpt`), read and written as a stream, without MindSpore.

Layout (mindspore/train/serialization.py and its checkpoint.proto): a protobuf message of repeated field 1,
one entry a tensor: {1: tag, 2: {1: repeated dims, 2: tensor_type, 3: tensor_content}}. A large tensor is cut
into entries that follow each other under one tag, each with the dims of the whole. With `crc_check` the file
ends in b"crc_num" and ten big-endian bytes, the CRC-32 of all before.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glm_ms.convert.dtypes import DTYPES, FROM_MINDSPORE
from glm_ms.convert.tensor_file import TensorFile, TensorInfo, describe_content, read_array
from glm_ms.storage.errors import CheckpointError

_SLICE_BYTES = 512 * 1024 * 1024  # as MindSpore cuts; a protobuf field must stay below 2 GiB
_ENTRY_KEY = b"\n"  # field 1, length-delimited
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CRC_MARK, _CRC_BYTES = b"crc_num", 10
_READ_CHUNK = 16 * 1024 * 1024
_MAX_NAME = 4096
# Encrypted files begin with the number of their cipher (AES-GCM, AES-CBC, SM4-CBC), little-endian.
_CIPHERS = tuple((0x7F3A5ED8 + cipher).to_bytes(4, "little") for cipher in range(3))


@dataclass
class _Tensor:
    dims: list[int] = field(default_factory=list)
    kind: str = ""
    slices: list[tuple[int, int]] = field(default_factory=list)  # offset and length in the file


class MindSporeFile(TensorFile):
    """Reads a `.ckpt` file. Opening walks the entries and skips their contents.

    Raises:
        CheckpointError: not a MindSpore checkpoint, encrypted, truncated, or its CRC does not match.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._tensors: dict[str, _Tensor] = {}
        with path.open("rb") as file:
            end = self._payload_end(file)
            self._walk(file, end)
        self.entries = {name: self._info(name, tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        info = self.entries[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name}: type {info.dtype} cannot be read")
        array = np.empty(info.shape, DTYPES[info.dtype].storage)
        flat = array.reshape(-1).view(np.uint8)
        position = 0
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            for offset, length in self._tensors[name].slices:
                read_array(self._file, offset, flat[position : position + length], self.path)
                position += length
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        return array

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _payload_end(self, file: BinaryIO) -> int:
        """Where the entries end; verifies the CRC where the file has one."""
        head = file.read(64)
        if head.startswith(_CIPHERS):
            raise CheckpointError(
                f"{self.path}: encrypted; decrypt it first: mindspore.load_checkpoint with dec_key, "
                "then mindspore.save_checkpoint without enc_key"
            )
        if not head.startswith(_ENTRY_KEY):
            raise CheckpointError(f"{self.path}: not a MindSpore checkpoint: it is {describe_content(head)}")
        size = file.seek(0, 2)
        end = size - len(_CRC_MARK) - _CRC_BYTES
        if end < 0:
            return size
        file.seek(end)
        trailer = file.read()
        if not trailer.startswith(_CRC_MARK):
            return size
        if _crc32(file, end) != int.from_bytes(trailer[len(_CRC_MARK) :], "big"):
            raise CheckpointError(f"{self.path}: CRC does not match; the file is damaged, fetch it again")
        return end

    def _walk(self, file: BinaryIO, end: int) -> None:
        file.seek(0)
        previous = None
        for number, value in self._fields(file, end):
            if number != 1 or isinstance(value, int):
                raise CheckpointError(f"{self.path}: not a MindSpore checkpoint: field {number} at top level")
            tag, tensor = self._entry(file, *value)
            if tag in self._tensors and tag != previous:
                raise CheckpointError(f"{self.path}: {tag}: stored twice")
            known = self._tensors.setdefault(tag, tensor)
            if known is not tensor:
                if (known.dims, known.kind) != (tensor.dims, tensor.kind):
                    raise CheckpointError(f"{self.path}: {tag}: its slices differ in shape or type")
                known.slices += tensor.slices
            previous = tag

    def _entry(self, file: BinaryIO, offset: int, length: int) -> tuple[str, _Tensor]:
        tag, body = "", None
        file.seek(offset)
        for number, value in self._fields(file, offset + length):
            if number == 1 and not isinstance(value, int):
                tag = self._text(file, value)
            elif number == 2 and not isinstance(value, int):
                body = value
        if not tag or body is None:
            raise CheckpointError(f"{self.path}: entry {tag!r} at byte {offset} is no tensor")
        tensor = _Tensor()
        file.seek(body[0])
        for number, value in self._fields(file, sum(body)):
            if number == 1 and isinstance(value, int):
                tensor.dims.append(value)
            elif number == 2 and not isinstance(value, int):
                tensor.kind = self._text(file, value)
            elif number == 3 and not isinstance(value, int):
                tensor.slices.append(value)
        return tag, tensor

    def _fields(self, file: BinaryIO, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """Yields (field number, varint or (offset, length) of bytes) up to `end`, restoring its position."""
        position = file.tell()
        while position < end:
            file.seek(position)
            key = self._varint(file)
            number, wire = key >> 3, key & 7
            value: int | tuple[int, int]
            if wire == _VARINT:
                value = self._varint(file)
                position = file.tell()
            elif wire in (_BYTES, _FIXED32, _FIXED64):
                length = {_FIXED32: 4, _FIXED64: 8}.get(wire) or self._varint(file)
                value = (file.tell(), length)
                position = sum(value)
            else:
                raise CheckpointError(f"{self.path}: damaged at byte {position}: wire type {wire}")
            if position > end:
                raise CheckpointError(f"{self.path}: truncated or damaged: an entry ends at byte {position}, "
                                      f"beyond {end}; fetch it again")  # fmt: skip
            yield number, value

    def _varint(self, file: BinaryIO) -> int:
        result = 0
        for shift in range(0, 70, 7):
            byte = file.read(1)
            if not byte:
                raise CheckpointError(f"{self.path}: truncated; fetch it again")
            result |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return result
        raise CheckpointError(f"{self.path}: damaged before byte {file.tell()}: a number has no end")

    def _text(self, file: BinaryIO, span: tuple[int, int]) -> str:
        file.seek(span[0])
        try:
            return file.read(min(span[1], _MAX_NAME)).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: damaged at byte {span[0]}: a name is not text") from None

    def _info(self, name: str, tensor: _Tensor) -> TensorInfo:
        shape = () if tensor.dims == [0] else tuple(tensor.dims)  # MindSpore's spelling of a scalar
        dtype = FROM_MINDSPORE.get(tensor.kind, tensor.kind)
        stored = sum(length for _, length in tensor.slices)
        if dtype in DTYPES and stored != math.prod(shape) * DTYPES[dtype].storage.itemsize:
            raise CheckpointError(
                f"{self.path}: {name}: {stored} bytes stored for shape {list(shape)} of {dtype}; "
                "the file is truncated or damaged, fetch it again"
            )
        return TensorInfo(shape, dtype)


def write_mindspore(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, arrays: Iterator[np.ndarray]
) -> None:
    """Writes one `.ckpt` that `mindspore.load_checkpoint` reads, holding one tensor at a time.

    Args:
        path: file to write; must not exist.
        shapes: name -> shape, in the order of `arrays`.
        dtype: element type of all tensors, a name of `dtypes.DTYPES`.
        arrays: gives one array per name, in the storage type of `dtype`.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("xb") as file:
        for name, shape in shapes.items():
            write_tensor(file, name, TensorInfo(shape, dtype), next(arrays))


def write_tensor(file: BinaryIO, name: str, info: TensorInfo, array: np.ndarray) -> None:
    """Appends the entries of one tensor to a `.ckpt`; `array` is in the storage type of `info.dtype`."""
    kind = DTYPES[info.dtype].mindspore
    content = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for start in range(0, len(content), _SLICE_BYTES):
        part = content[start : start + _SLICE_BYTES]
        file.write(_entry_head(name, info.shape, kind, len(part)))
        file.write(part)


def _entry_head(name: str, shape: tuple[int, ...], kind: str, size: int) -> bytes:
    """Everything of an entry but the content, which comes last and so can follow unbuffered."""
    tensor = b"".join(b"\x08" + _encode(dim) for dim in shape or (0,))  # MindSpore's spelling of a scalar
    tensor += b"\x12" + _encode(len(kind)) + kind.encode("ascii") + b"\x1a" + _encode(size)
    tag = name.encode("utf-8")
    value = b"\n" + _encode(len(tag)) + tag + b"\x12" + _encode(len(tensor) + size) + tensor
    return _ENTRY_KEY + _encode(len(value) + size) + value


def _encode(number: int) -> bytes:
    """A number as protobuf varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(encoded) + bytes([number])


def _crc32(file: BinaryIO, end: int) -> int:
    file.seek(0)
    crc = 0
    while file.tell() < end:
        crc = zlib.crc32(file.read(min(_READ_CHUNK, end - file.tell())), crc)
    return crc
