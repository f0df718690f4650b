"""One reader for text and JSON: UTF-8 with or without byte order mark, no duplicate keys, bounded nesting.

Errors are of the class `error` that the caller names; `source` is the name of the file in their messages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError

MAX_DEPTH = 100  # levels of JSON; code that walks a value recursively stays far from Python's limit
_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_text(path: Path, error: type[FileError] = FileError, missing: str = "no such file") -> str:
    """Text of a UTF-8 file, without byte order mark; carriage return and line feed become a line feed.

    Raises:
        error: the file is missing (with the message `missing`), is a folder, cannot be read or is not UTF-8.
    """
    try:
        text = decode_text(path.read_bytes(), path, error)
    except FileNotFoundError:
        raise error(f"{path}: {missing}") from None
    except IsADirectoryError:
        raise error(f"{path}: is a folder; give a file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
    return text.replace("\r\n", "\n")


def decode_text(content: bytes, source: str | Path, error: type[FileError] = FileError, line: int = 1) -> str:
    """Bytes of UTF-8 text, from this line of their file, as a string without byte order mark.

    Raises:
        error: not UTF-8; the message names the line.
    """
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        raise error(not_utf8(problem, source, line)) from None


def not_utf8(problem: UnicodeDecodeError, source: str | Path, line: int) -> str:
    """Message for bytes of `source`, from its line `line`, that are not UTF-8."""
    line += problem.object.count(b"\n", 0, problem.start)
    return (
        f"{source}:{line}: not UTF-8 (byte 0x{problem.object[problem.start]:02x}); "
        f"convert the file, for example: iconv -f GB18030 -t UTF-8 {Path(source).name}"
    )


def read_json(path: Path, error: type[FileError] = FileError, missing: str = "no such file") -> Any:
    """The JSON value of a file; errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(path, error, missing), path, error)


def read_object(path: Path, error: type[FileError] = FileError, missing: str = "no such file") -> dict[str, Any]:
    """The JSON object of a file; errors as of `read_text` and `parse_object`."""
    return parse_object(read_text(path, error, missing), path, error)


def parse_object(text: str, source: str | Path, error: type[FileError] = FileError) -> dict[str, Any]:
    """As `parse_json` for a whole file; a value that is not an object is an error too."""
    value = parse_json(text, source, error)
    if not isinstance(value, dict):
        raise error(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(
    text: str, source: str | Path, error: type[FileError] = FileError, line: int | None = None, remedy: str = ""
) -> Any:
    """Parses one JSON value.

    Args:
        line: of the file at which `text` begins; None if `text` is the whole file.
        remedy: end of the message for text that is not JSON.

    Raises:
        error: not valid JSON, a key twice in one object, nested deeper than `MAX_DEPTH`, or a number with too many
            digits for Python.
    """
    place = source if line is None else f"{source}:{line}"
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
            raise RecursionError
    except json.JSONDecodeError as problem:
        place = f"{source}:{(line or 1) + problem.lineno - 1}"
        raise error(f"{place}: not valid JSON: {problem.msg} at column {problem.colno}{remedy}") from None
    except RecursionError:
        raise error(f"{place}: not valid JSON: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as problem:
        raise error(f"{place}: not valid JSON: {problem}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{twice}" twice in one object; remove one')
    return found


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Walks level by level, so that deep values do not exhaust the stack."""
    level = [value]
    for _ in range(limit):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def exponent_number(value: Any) -> Any:
    """`value` as a float if it is text like 1e-5 or .5E3, else `value` unchanged.

    YAML 1.1 reads a number as text if it has an exponent but no dot or no sign of the exponent.
    """
    return float(value) if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value) else value
