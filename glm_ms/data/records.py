"""Records of prompt and response; errors name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.data.encoder import Message, Messages
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


def parse_record(value: Any, columns: Sequence[str], place: str, line: int = 0) -> Record | None:
    """The record of a JSON value; None if prompt or response is empty or null.

    Args:
        value: a JSON value.
        columns: as in `read_records`.
        place: `file:line`, the beginning of errors.
        line: kept in the record.

    Raises:
        DataError: the value is not an object, a column is missing or not a string, or `columns` names others than
            prompt, response and history.
    """
    _check_columns(columns)
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: a record must be a JSON object such as "
            f"{{{', '.join(f'{json.dumps(name)}: ...' for name in columns)}}}, found {type(value).__name__}"
        )
    prompt, response = (_text(value, name, place) for name in columns[:2])
    history = _history(value, columns[2], place) if len(columns) == 3 else ()
    return Record(prompt, response, history, line) if prompt and response else None


def read_prompt_and_answer(value: Any, place: str, columns: Sequence[str]) -> Messages | None:
    """Reader of ADGenDataLoader: `parse_record` as messages of user and assistant in turn; only answers bear loss."""
    record = parse_record(value, columns, place)
    if record is None:
        return None
    rounds = [*record.history, (record.prompt, record.response)]
    return tuple(
        message
        for prompt, response in rounds
        for message in (Message("user", prompt), Message("assistant", response, loss=True))
    )


def no_records(path: Path) -> DataError:
    """The error about a file without any value."""
    return DataError(f"{path}: holds no records; expected one JSON object a line")


def read_records(path: str | Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yields the records of a file of prompts and responses, as it reads; skips those with an empty text.

    Args:
        path: JSON lines or a JSON array, see `glm_ms.storage.json_lines`.
        columns: names of the prompt and the response column, and optionally of a history column, whose value
            is a list of [prompt, response] pairs.

    Raises:
        DataError: the file is missing, empty or not UTF-8; a line is not JSON or not an object; a column is missing or
            not a string. The message begins with `file:line`.
    """
    _check_columns(columns)
    path, found = Path(path), False
    for raw in raw_values(path):
        found = True
        record = parse_record(parse_value(raw, path), columns, f"{path}:{raw.line}", raw.line)
        if record is not None:
            yield record
    if not found:
        raise no_records(path)


def _check_columns(columns: Sequence[str]) -> None:
    if isinstance(columns, str) or len(columns) not in (2, 3):
        raise DataError(f"columns = {columns!r}: must name prompt and response, optionally history")


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
    """`text` itself; DataError, beginning with `place`, if it is not a string that UTF-8 can encode."""
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
