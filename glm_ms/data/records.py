"""Reader of records of prompt and answer (ADGEN), and checks that all readers share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_ms.data.encoder import Message, Messages
from glm_ms.storage.errors import DataError
from glm_ms.storage.suggest import did_you_mean


def read_prompt_and_answer(value: Any, place: str, columns: Sequence[str]) -> Messages | None:
    """Reader of ADGenDataLoader: messages of user and assistant in turn, the answers with loss.

    Args:
        value: a JSON value.
        place: `file:line`, the beginning of errors.
        columns: names of the prompt and the answer column, and optionally of a history column, whose value is a list
            of [prompt, answer] pairs.

    Returns:
        The messages; None if prompt or answer is empty or null, which the reference skips too.

    Raises:
        DataError: the value is not an object, a column is missing or not a string, or `columns` has another length.
    """
    if isinstance(columns, str) or len(columns) not in (2, 3):
        raise DataError(f"columns = {columns!r}: must name prompt and response, optionally history")
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: a record must be a JSON object such as "
            f"{{{', '.join(f'{json.dumps(name)}: ...' for name in columns)}}}, found {type(value).__name__}"
        )
    prompt, answer = (_text(value, name, place) for name in columns[:2])
    history = _history(value, columns[2], place) if len(columns) == 3 else ()
    if not prompt or not answer:
        return None
    return tuple(
        message
        for question, reply in [*history, (prompt, answer)]
        for message in (Message("user", question), Message("assistant", reply, loss=True))
    )


def no_records(path: Path) -> DataError:
    """The error about a file without any value."""
    return DataError(f"{path}: has no records; expected one JSON object per line")


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
            f"{place} has half of a surrogate pair ({text[error.start]!r}) at character {error.start}; "
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
