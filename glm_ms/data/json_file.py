"""JSON values of a file, one after the other or by number, with their place; never the whole file in memory.

A file holds JSON lines (one value a line, blank lines allowed) or one JSON array. UTF-8, with or without byte
order mark.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from glm_ms.data.errors import DataError

_BOM = b"\xef\xbb\xbf"
_WHITESPACE = " \t\r\n"
_NO_WHITESPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20
# "\u1234" and "Infinity" may be cut by the end of what has been read so far.
_LONGEST_TOKEN = 16


class RawValue(NamedTuple):
    """A JSON value as it stands in the file.

    Attributes:
        line: of the file, from 1, in which the value begins.
        start: byte of the file at which `text` begins.
        text: the value, with white space around.
    """

    line: int
    start: int
    text: bytes


def raw_values(path: str | Path) -> Iterator[RawValue]:
    """Every value of a file. Lines are not parsed here; an array is, as far as it takes to find its items.

    Raises:
        DataError: the file is missing, cannot be read, or an array in it is not valid JSON or not UTF-8.
    """
    with _opened(Path(path)) as file:
        yield from _values_of(file, Path(path))


def parse_value(raw: RawValue, path: Path) -> Any:
    """What a raw value says.

    Raises:
        DataError: not UTF-8 or not valid JSON.
    """
    try:
        # A string and not bytes: json would guess at other encodings.
        return json.loads(raw.text.decode("utf-8").strip(_WHITESPACE))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw.line, error) from None
    except json.JSONDecodeError as error:
        line = raw.line + error.lineno - 1
        raise DataError(
            f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}; "
            "each line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{raw.line}: not valid JSON: {error}") from None


class JsonFile:
    """The values of one file by number, read when asked for: 16 bytes of memory for each.

    The file must not be changed while this object is in use. Threads may share it, and pickling it is cheap.

    Args:
        path: file of JSON values.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._starts, self._sizes = array("q"), array("q")
        self._file = _opened(self.path)
        self._state = _state(self._file)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._state[0]

    def raw_values(self) -> Iterator[RawValue]:
        """As `raw_values`."""
        # Another description of the file: its position is nobody else's.
        with _opened(self.path) as file:
            self._check(file)
            yield from _values_of(file, self.path)
            self._check(file)

    def append(self, raw: RawValue) -> None:
        """Gives the next number to a value of this file."""
        self._starts.append(raw.start)
        self._sizes.append(len(raw.text))

    def __getitem__(self, number: int) -> Any:
        """The value with a number.

        Raises:
            DataError: the file has changed.
        """
        self._check(self._file)
        start, size = self._starts[number], self._sizes[number]
        text = os.pread(self._file.fileno(), size, start)
        return parse_value(RawValue(0, start, text), self.path)

    def _check(self, file: BinaryIO) -> None:
        if _state(file) != self._state:
            raise DataError(
                f"{self.path}: has been changed since it was read first; leave it alone while it is in use, "
                "and start again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = _opened(self.path)
        self._check(self._file)


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file of JSON lines")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _values_of(file: BinaryIO, path: Path) -> Iterator[RawValue]:
    start, is_array = _beginning(file)
    if is_array:
        yield from _array_items(_Window(file, path, start))
        return
    for line, text in enumerate(file, start=1):
        if text.strip(_WHITESPACE.encode()):
            yield RawValue(line, start, text)
        start += len(text)


def _beginning(file: BinaryIO) -> tuple[int, bool]:
    """The first byte after a byte order mark, where the file is left; and whether an array begins there."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    first = b" "
    while first and first in _WHITESPACE.encode():
        first = file.read(1)
    file.seek(start)
    return start, first == b"["


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    line += error.object.count(b"\n", 0, error.start)
    return DataError(
        f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); "
        f"convert the file, for example: iconv -f GB18030 -t UTF-8 {path.name}"
    )


class _Window:
    """The part of a file that is being parsed. It slides on as values are taken from its front.

    Attributes:
        text, position: what has been read, and how much of it is done with.
        line, offset: line and byte of the file at which `position` stands.
    """

    def __init__(self, file: BinaryIO, path: Path, offset: int) -> None:
        self.path = path
        self.text, self.position = "", 0
        self.line, self.offset = 1, offset
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """Steps over white space to the next character and tells it; an empty string at the end of the file."""
        while True:
            self.advance(_NO_WHITESPACE.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def value(self) -> RawValue:
        """Takes the value that begins at `position`."""
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._grow():
                    continue
                line = self.line + self.text.count("\n", self.position, error.pos)
                raise DataError(f"{self.path}:{line}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{self.line}: not valid JSON: {error}") from None
            # A number may go on: 1.5 and then e3.
            is_cut = isinstance(value, (int, float)) and len(self.text) - end < _LONGEST_TOKEN
            if not is_cut or not self._grow():
                break
        raw = RawValue(self.line, self.offset, self.text[self.position : end].encode("utf-8"))
        self.advance(end)
        return raw

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether what is wrong may be that the rest has not been read yet."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LONGEST_TOKEN

    def advance(self, position: int) -> None:
        """Is done with everything before `position`."""
        passed = self.text[self.position : position]
        self.line += passed.count("\n")
        self.offset += len(passed.encode("utf-8"))
        self.position = position

    def _grow(self) -> bool:
        """Reads on, as much again as is in hand, and drops what is done with; False at the end of the file, where
        nothing changes."""
        in_hand = len(self.text) - self.position
        more, ended = "", False
        while not more and not ended:
            chunk = self._file.read(max(_CHUNK, in_hand))
            ended = not chunk
            try:
                more = self._decoder.decode(chunk, final=ended)
            except UnicodeDecodeError as error:
                line = self.line + self.text.count("\n", self.position)
                raise _not_utf8(self.path, line, error) from None
        if more:
            self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)


def _array_items(window: _Window) -> Iterator[RawValue]:
    """Items of a JSON array one by one, so that each has its line."""
    window.next_character()
    window.advance(window.position + 1)
    closed = window.next_character() == "]"
    while not closed:
        yield window.value()
        separator = window.next_character()
        if separator not in (",", "]") or not separator:
            raise DataError(
                f"{window.path}:{window.line}: not valid JSON: expected ',' or ']' after a record"
            )
        closed = separator == "]"
        if not closed:
            window.advance(window.position + 1)
            window.next_character()
    window.advance(window.position + 1)
    if window.next_character():
        raise DataError(f"{window.path}:{window.line}: text after the end of the JSON array; remove it")
