"""The wire format of protobuf messages, as far as MindSpore's files use it (protobuf.dev, "Encoding")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from glm_ms.storage.errors import FileError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Span = tuple[int, int]  # offset and length of bytes in the file


class WireError(FileError):
    """Not protobuf, or damaged; the message has no file name."""


def fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int | Span]]:
    """Fields of the message from byte `begin` to byte `end`: number, and an integer or the span of its bytes."""
    position = begin
    while position < end:
        file.seek(position)
        key = varint(file)
        wire = key & 7
        value: int | Span
        if wire == _VARINT:
            value = varint(file)
            position = file.tell()
        elif wire in (_BYTES, _FIXED32, _FIXED64):
            length = {_FIXED32: 4, _FIXED64: 8}.get(wire) or varint(file)
            value = (file.tell(), length)
            position = sum(value)
        else:
            raise WireError(f"damaged at byte {position}: wire type {wire}")
        if position > end:
            raise WireError(f"truncated or damaged: an entry ends at byte {position}, beyond {end}")
        yield key >> 3, value


def varint(file: BinaryIO) -> int:
    """The integer at the position of the file, which moves behind it."""
    result = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise WireError("truncated: ends too early")
        result |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return result
    raise WireError(f"damaged before byte {file.tell()}: a number has no end")


def encode(number: int) -> bytes:
    """A number that is not negative, as varint."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(encoded) + bytes([number])
