"""Streaming reader of JSON lines and JSON arrays: values with their lines, in order or by number.

A file has JSON lines (one value per line, blank lines allowed) or one JSON array, in UTF-8 with or without byte order
mark. Memory does not grow with the size of the file, except 16 bytes for each value of a `JsonFile`.
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

from glm_ms.storage.errors import DataError
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import HEAD, check_text, decode_text, not_utf8, parse_json

_BOM = b"\xef\xbb\xbf"
_WHITESPACE = " \t\r\n"
_NON_WHITESPACE = re.compile(r"[^ \t\r\n]")
_CHUNK = 1 << 20
# The end of the window may cut "\u1234" or "Infinity".
_LONGEST_TOKEN = 16


class RawValue(NamedTuple):
    """A JSON value that is not parsed yet."""

    line: int  # of the file, from 1, in which the value begins
    start: int  # offset of `text` in the file, in bytes
    text: bytes  # with surrounding white space


def raw_values(path: str | Path) -> Iterator[RawValue]:
    """Every value of a file. Lines are not parsed; an array is parsed to find where its items end.

    Raises:
        DataError: the file is missing, cannot be read, or an array in it is not valid JSON or not UTF-8.
    """
    with _opened(Path(path)) as file:
        yield from _values_of(file, Path(path))


def parse_value(raw: RawValue, path: Path) -> Any:
    """Parses a raw value; raises DataError if it is not UTF-8, not valid JSON, or has a key twice in one object."""
    # `json` guesses the encoding of bytes, so they are decoded first.
    text = decode_text(raw.text, path, DataError, raw.line).strip(_WHITESPACE)
    return parse_json(text, path, DataError, raw.line, "; each line must be one whole JSON object")


class JsonFile:
    """Random access to the values of a file, which are read on demand.

    The file must not change while this object is in use; every access raises DataError if it cannot be read or has
    changed. Threads may share the object; pickling it is cheap.
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
        # A file object with a position of its own: other readers of this object do not move it.
        with _opened(self.path) as file:
            self._check(file)
            yield from _values_of(file, self.path)
            self._check(file)

    def append(self, raw: RawValue) -> None:
        """Adds a value of this file under the next number."""
        self._starts.append(raw.start)
        self._sizes.append(len(raw.text))

    def __getitem__(self, number: int) -> Any:
        """The value with this number."""
        self._check(self._file)
        start, size = self._starts[number], self._sizes[number]
        text = os.pread(self._file.fileno(), size, start)
        return parse_value(RawValue(0, start, text), self.path)

    def _check(self, file: BinaryIO) -> None:
        if _state(file) != self._state:
            raise DataError(
                f"{self.path}: has been changed since it was read first; do not change it during a run, and start again"
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
    if problem := path_problem(str(path)):
        raise DataError(problem)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file of JSON lines")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _values_of(file: BinaryIO, path: Path) -> Iterator[RawValue]:
    head = file.read(HEAD)
    check_text(head, path, DataError)
    start = len(_BOM) if head.startswith(_BOM) else 0
    file.seek(start)
    first = b" "
    while first and first in _WHITESPACE.encode():
        first = file.read(1)
    file.seek(start)
    if first == b"[":
        yield from _array_items(_Window(file, path, start))
        return
    for line, text in enumerate(file, start=1):
        if text.strip(_WHITESPACE.encode()):
            yield RawValue(line, start, text)
        start += len(text)


class _Window:
    """The part of a file that is being parsed; it slides through the file.

    Attributes:
        text, position: text in memory, and the index in it up to which it is parsed.
        line, offset: line and byte of the file that belong to `position`.
    """

    def __init__(self, file: BinaryIO, path: Path, offset: int) -> None:
        self.path = path
        self.text, self.position = "", 0
        self.line, self.offset = 1, offset
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """Skips white space and returns the next character; an empty string at the end of the file."""
        while True:
            match = _NON_WHITESPACE.search(self.text, self.position)
            self.advance(match.start() if match else len(self.text))
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def value(self) -> RawValue:
        """The value that begins at `position`, which then moves to its end."""
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # The error may come from the end of the window rather than from the file.
                may_be_cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _LONGEST_TOKEN
                if may_be_cut and self._grow():
                    continue
                line = self.line + self.text.count("\n", self.position, error.pos)
                raise DataError(f"{self.path}:{line}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{self.line}: not valid JSON: {error}") from None
            # The end of the window may cut a number: 1.5 of 1.5e3.
            is_cut = isinstance(value, (int, float)) and len(self.text) - end < _LONGEST_TOKEN
            if not is_cut or not self._grow():
                break
        raw = RawValue(self.line, self.offset, self.text[self.position : end].encode("utf-8"))
        self.advance(end)
        return raw

    def advance(self, position: int) -> None:
        """Moves to `position` and counts the lines and bytes before it."""
        passed = self.text[self.position : position]
        self.line += passed.count("\n")
        self.offset += len(passed.encode("utf-8"))
        self.position = position

    def _grow(self) -> bool:
        """Drops the parsed text and reads on, at least as much as is left, so that long values take linear time.

        Returns False at the end of the file; nothing changes then.
        """
        unparsed = len(self.text) - self.position
        more, ended = "", False
        while not more and not ended:
            chunk = self._file.read(max(_CHUNK, unparsed))
            ended = not chunk
            try:
                more = self._decoder.decode(chunk, final=ended)
            except UnicodeDecodeError as error:
                line = self.line + self.text.count("\n", self.position)
                raise DataError(not_utf8(error, self.path, line)) from None
        if more:
            self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)


def _array_items(window: _Window) -> Iterator[RawValue]:
    """Items of a JSON array, each with its line."""
    window.next_character()
    window.advance(window.position + 1)
    separator = window.next_character()
    while separator != "]":
        yield window.value()
        separator = window.next_character()
        if separator not in (",", "]"):
            raise DataError(f"{window.path}:{window.line}: not valid JSON: expected ',' or ']' after a record")
        if separator == ",":
            window.advance(window.position + 1)
            window.next_character()
    window.advance(window.position + 1)
    if window.next_character():
        raise DataError(f"{window.path}:{window.line}: text after the end of the JSON array; remove it")
