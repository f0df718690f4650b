"""The MindSpore checkpoint format (`.ckpt`), read and written as a stream, without MindSpore.

Layout (mindspore/train/serialization.py and its checkpoint.proto): a protobuf message of repeated field 1, with one
entry per tensor: {1: tag, 2: {1: repeated dims, 2: tensor_type, 3: tensor_content}}. A large tensor is split into
consecutive entries with the same tag, each with the dims of the whole. With `crc_check` the file ends in b"crc_num" and
ten big-endian bytes, the CRC-32 of all bytes before.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glm_ms.convert.dtypes import DTYPES, FROM_MINDSPORE
from glm_ms.convert.protobuf import Span, WireError, encode, fields
from glm_ms.convert.tensor_file import TensorFile, TensorInfo, describe_content
from glm_ms.storage.errors import CheckpointError

_ENTRY_BYTES = 512 * 1024 * 1024  # the limit of MindSpore; a protobuf field must stay below 2 GiB
_ENTRY_KEY = b"\n"  # field 1, length-delimited
_CRC_MARK, _CRC_BYTES = b"crc_num", 10
_READ_CHUNK = 16 * 1024 * 1024
_MAX_NAME = 4096
# Encrypted files begin with the number of their cipher (AES-GCM, AES-CBC, SM4-CBC), little-endian.
_CIPHERS = tuple((0x7F3A5ED8 + cipher).to_bytes(4, "little") for cipher in range(3))


class MindSporeFile(TensorFile):
    """Reads a `.ckpt` file. Opening walks through the entries and skips their contents.

    Raises CheckpointError if it is not a MindSpore checkpoint, is encrypted or truncated, or its CRC does not match.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with path.open("rb") as file:
                self._walk(file, self._payload_end(file))
        except WireError as error:
            raise CheckpointError(f"{path}: {error}; fetch it again") from None
        for name, info in self.entries.items():
            stored = sum(length for _, length in self.spans[name])
            if info.dtype in DTYPES and stored != info.nbytes:
                raise CheckpointError(
                    f"{path}: {name}: {stored} bytes stored for {info}; the file is truncated or damaged, "
                    "fetch it again"
                )

    def _payload_end(self, file: BinaryIO) -> int:
        """Where the entries end; verifies the CRC if the file has one."""
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
        file.seek(0)
        crc = 0
        while file.tell() < end:
            crc = zlib.crc32(file.read(min(_READ_CHUNK, end - file.tell())), crc)
        if crc != int.from_bytes(trailer[len(_CRC_MARK) :], "big"):
            raise CheckpointError(f"{self.path}: CRC does not match; the file is damaged, fetch it again")
        return end

    def _walk(self, file: BinaryIO, end: int) -> None:
        previous = None
        for number, value in fields(file, 0, end):
            if number != 1 or isinstance(value, int):
                raise CheckpointError(f"{self.path}: not a MindSpore checkpoint: field {number} at top level")
            tag, info, spans = self._entry(file, value)
            if tag in self.entries and tag != previous:
                raise CheckpointError(f"{self.path}: {tag}: stored twice")
            if self.entries.setdefault(tag, info) != info:
                raise CheckpointError(f"{self.path}: {tag}: its pieces differ in shape or type")
            self.spans.setdefault(tag, []).extend(spans)
            previous = tag

    def _entry(self, file: BinaryIO, span: Span) -> tuple[str, TensorInfo, list[Span]]:
        """Name, description and places of the content of one entry."""
        entry = dict(fields(file, span[0], sum(span)))
        tag, body, kind = entry.get(1), entry.get(2), ""
        name = self._text(file, tag) if isinstance(tag, tuple) else ""
        if not name or not isinstance(body, tuple):
            raise CheckpointError(f"{self.path}: entry {name!r} at byte {span[0]} is not a tensor")
        dims, spans = [], []
        for number, value in fields(file, body[0], sum(body)):
            if number == 1 and isinstance(value, int):
                dims.append(value)
            elif number == 2 and not isinstance(value, int):
                kind = self._text(file, value)
            elif number == 3 and not isinstance(value, int):
                spans.append(value)
        shape = () if dims == [0] else tuple(dims)  # MindSpore's spelling of a scalar
        return name, TensorInfo(shape, FROM_MINDSPORE.get(kind, kind)), spans

    def _text(self, file: BinaryIO, span: Span) -> str:
        file.seek(span[0])
        try:
            return file.read(min(span[1], _MAX_NAME)).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: damaged at byte {span[0]}: a name is not text") from None


def write_mindspore(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, arrays: Iterator[np.ndarray]) -> None:
    """Writes a new `.ckpt` that `mindspore.load_checkpoint` reads; arguments as of `write_safetensors`."""
    with path.open("xb") as file:
        for name, shape in shapes.items():
            write_tensor(file, name, TensorInfo(shape, dtype), next(arrays))


def write_tensor(file: BinaryIO, name: str, info: TensorInfo, array: np.ndarray) -> None:
    """Appends the entries of one tensor to a `.ckpt`; `array` has the storage type of `info.dtype`."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(content), _ENTRY_BYTES):
        part = content[start : start + _ENTRY_BYTES]
        file.write(_entry_head(name, info, len(part)))
        file.write(part)


def _entry_head(name: str, info: TensorInfo, size: int) -> bytes:
    """An entry up to its content, which comes last and is written without a copy."""
    kind = DTYPES[info.dtype].mindspore
    tensor = b"".join(b"\x08" + encode(dim) for dim in info.shape or (0,))  # MindSpore's spelling of a scalar
    tensor += b"\x12" + encode(len(kind)) + kind.encode("ascii") + b"\x1a" + encode(size)
    tag = name.encode("utf-8")
    value = b"\n" + encode(len(tag)) + tag + b"\x12" + encode(len(tensor) + size) + tensor
    return _ENTRY_KEY + encode(len(value) + size) + value
