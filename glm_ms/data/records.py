"""Reading records of prompt and response from JSON files; every fault is reported with file and line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BOM = b"\xef\xbb\xbf"
_WHITESPACE = " \t\r\n"


class DataError(ValueError):
    """A data file or a setting for it cannot be used; the message names the place and the remedy."""


@dataclass(frozen=True)
class Record:
    """One example: a prompt, the response to it, and earlier (prompt, response) pairs."""

    prompt: str
    response: str
    history: tuple[tuple[str, str], ...] = ()
    line: int = 0


class RecordReader:
    """Iterates over the usable records of a file, reading as it goes; see `read_records`.

    Attributes:
        skipped: records passed over so far because prompt or response is empty or null.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]) -> None:
        if isinstance(columns, str) or len(columns) not in (2, 3):
            raise DataError(f"columns = {columns!r}: must name prompt and response, optionally history")
        self.path = Path(path)
        self.columns = tuple(columns)
        self.skipped = 0

    def __iter__(self) -> Iterator[Record]:
        self.skipped = 0
        found = False
        for line, value in _read_objects(self.path):
            found = True
            record = self._record(value, line)
            if record.prompt and record.response:
                yield record
            else:
                self.skipped += 1
        if not found:
            raise DataError(f"{self.path}: holds no records; expected one JSON object a line")

    def _record(self, value: Any, line: int) -> Record:
        place = f"{self.path}:{line}"
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: a record must be a JSON object such as "
                f"{{{', '.join(f'{json.dumps(name)}: ...' for name in self.columns)}}}, "
                f"found {type(value).__name__}"
            )
        prompt, response = (_text(value, name, place) for name in self.columns[:2])
        history = _history(value, self.columns[2], place) if len(self.columns) == 3 else ()
        return Record(prompt, response, history, line)


def read_records(path: str | Path, columns: Sequence[str]) -> RecordReader:
    """Reads prompt and response columns of a file.

    Args:
        path: JSON lines (one object a line, blank lines allowed), or one JSON array of objects. UTF-8, with
            or without byte order mark.
        columns: names of the prompt and the response column, and optionally of a history column, whose value
            is a list of [prompt, response] pairs.

    Returns:
        An iterable of `Record`. Records whose prompt or response is empty or null are passed over, as the
        reference does, and counted in its `skipped`.

    Raises:
        DataError: on iteration: the file is missing, empty or not UTF-8; a line is not JSON or not an
            object; a column is missing or its value is not a string. The message begins with `file:line`.
    """
    return RecordReader(path, columns)


def _read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every JSON value of the file."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file of JSON lines")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        if _begins_array(file):
            yield from _array_items(path, _decode(file.read(), path, 1))
            return
        for line, raw in enumerate(file, start=1):
            text = _decode(raw, path, line).strip(_WHITESPACE)
            if text:
                yield line, _parse(text, path, line)


def _begins_array(file: BinaryIO) -> bool:
    """Whether the first character is "["; leaves the file at its first byte after a byte order mark."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    first = b" "
    while first and first in _WHITESPACE.encode():
        first = file.read(1)
    file.seek(start)
    return first == b"["


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
            f"convert the file, for example: iconv -f GB18030 -t UTF-8 {path.name}"
        ) from None


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}; "
            "each line must be one whole JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: not valid JSON: {error}") from None


def _array_items(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array one by one, so that each has its line."""
    decoder = json.JSONDecoder()
    position = _skip_whitespace(text, text.index("[") + 1)
    line, counted = 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON: {error}") from None
        yield line, value
        position = _skip_whitespace(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]") or not separator:
            line += text.count("\n", counted, position)
            raise DataError(f"{path}:{line}: not valid JSON: expected ',' or ']' after a record")
        closed = separator == "]"
        position = _skip_whitespace(text, position + 1) if not closed else position
    rest = _skip_whitespace(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise DataError(f"{path}:{line}: text after the end of the JSON array; remove it")


def _skip_whitespace(text: str, position: int) -> int:
    while position < len(text) and text[position] in _WHITESPACE:
        position += 1
    return position


def _column(value: dict[str, Any], name: str, place: str) -> Any:
    if name not in value:
        near = difflib.get_close_matches(name, list(value), n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise DataError(
            f"{place}: no column {name!r}, the record has {', '.join(map(repr, value)) or 'none'}{hint} "
            "Name the columns of the file in origin_columns"
        )
    return value[name]


def _text(value: dict[str, Any], name: str, place: str) -> str:
    text = _column(value, name, place)
    if text is None:
        return ""
    return _checked_text(text, f"{place}: column {name!r}")


def _checked_text(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{place} must be a string, found {type(text).__name__}: {str(text)[:60]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half of a surrogate pair ({text[error.start]!r}) at character {error.start}; "
            "write the whole pair or remove it"
        ) from None
    return text


def _history(value: dict[str, Any], name: str, place: str) -> tuple[tuple[str, str], ...]:
    pairs = _column(value, name, place)
    place = f"{place}: column {name!r}"
    if pairs is None:
        return ()
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{place} must be a list of [prompt, response] pairs, found {str(pairs)[:60]}")
    return tuple((_checked_text(first, place), _checked_text(second, place)) for first, second in pairs)
