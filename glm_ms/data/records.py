"""Reading records of prompt and response from JSON files; every fault is reported with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.storage.suggest import did_you_mean


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
        check_columns(columns)
        self.path = Path(path)
        self.columns = tuple(columns)
        self.skipped = 0

    def __iter__(self) -> Iterator[Record]:
        self.skipped = 0
        found = False
        for raw in raw_values(self.path):
            found = True
            record = parse_record(
                parse_value(raw, self.path), self.columns, f"{self.path}:{raw.line}", raw.line
            )
            if record is not None:
                yield record
            else:
                self.skipped += 1
        if not found:
            raise no_records(self.path)


def check_columns(columns: Sequence[str]) -> None:
    """Raises DataError unless `columns` names prompt and response, and optionally a history."""
    if isinstance(columns, str) or len(columns) not in (2, 3):
        raise DataError(f"columns = {columns!r}: must name prompt and response, optionally history")


def parse_record(value: Any, columns: Sequence[str], place: str, line: int = 0) -> Record | None:
    """The record that a JSON value stands for; None where prompt or response is empty or null.

    Args:
        value: what JSON says.
        columns: as in `read_records`.
        place: `file:line`, to begin an error with.
        line: kept in the record.

    Raises:
        DataError: the value is not an object, or a column is missing or not a string.
    """
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: a record must be a JSON object such as "
            f"{{{', '.join(f'{json.dumps(name)}: ...' for name in columns)}}}, found {type(value).__name__}"
        )
    prompt, response = (_text(value, name, place) for name in columns[:2])
    history = _history(value, columns[2], place) if len(columns) == 3 else ()
    return Record(prompt, response, history, line) if prompt and response else None


def no_records(path: Path) -> DataError:
    """The error about a file without any value."""
    return DataError(f"{path}: holds no records; expected one JSON object a line")


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


def _column(value: dict[str, Any], name: str, place: str) -> Any:
    if name not in value:
        raise DataError(
            f"{place}: no column {name!r}, the record has {', '.join(map(repr, value)) or 'none'}"
            f"{did_you_mean(name, value)} Name the columns of the file in origin_columns"
        )
    return value[name]


def _text(value: dict[str, Any], name: str, place: str) -> str:
    text = _column(value, name, place)
    if text is None:
        return ""
    return checked_text(text, f"{place}: column {name!r}")


def checked_text(text: Any, place: str) -> str:
    """`text`, held to be a string that UTF-8 can write; DataError, beginning with `place`, if it is not."""
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
    return tuple((checked_text(first, place), checked_text(second, place)) for first, second in pairs)
