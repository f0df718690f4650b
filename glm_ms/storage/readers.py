"""One reader for text and JSON: UTF-8 with or without byte order mark, no duplicate keys, bounded nesting.

Errors are of the class `error` that the caller names; `source` is the name of the file in their messages.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError
from glm_ms.storage.paths import path_problem, pattern_hint

HEAD = 4096  # bytes of a file that `check_text` looks at
MAX_DEPTH = 100  # levels of JSON; code that walks a value recursively stays far from Python's limit
# First bytes of files that are not text -> what they are, and the remedy for the file {0}.
_WRITES = "use what this command writes: "
_BINARY = {
    b"\x1f\x8b": ("compressed with gzip", _WRITES + "gzip -cd{0}"),
    b"BZh91AY&SY": ("compressed with bzip2", _WRITES + "bzip2 -cd{0}"),
    b"\xfd7zXZ\0": ("compressed with xz", _WRITES + "xz -cd{0}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", _WRITES + "zstd -cd{0}"),
    b"PK\3\4": ("a zip archive", "give a file in it: unzip{0}"),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file: git lfs pull --include{0}"),
}
_ICONV = _WRITES + "iconv -f {1} -t UTF-8{0}"
_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose mark is a part of it
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# Encoding -> the bytes of a group of four that are 0 in ASCII characters.
_ZEROS = {"UTF-32LE": (1, 2, 3), "UTF-32BE": (0, 1, 2), "UTF-16LE": (1, 3), "UTF-16BE": (0, 2)}
_EXAMINED = 1 << 26  # bytes of a file that decide about its encoding
_ASCII = bytes(range(128))
_CHANCE = 5  # bytes beyond ASCII from which on a beginning is UTF-8
_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_text(path: Path, error: type[FileError] = FileError, missing: str = "no such file") -> str:
    """Text of a UTF-8 file, without byte order mark; carriage return and line feed become a line feed.

    Raises:
        error: the file is missing (with the message `missing`), is a folder, cannot be read or is not UTF-8.
    """
    if unusable := path_problem(str(path)):
        raise error(unusable)
    try:
        text = decode_text(path.read_bytes(), path, error)
    except FileNotFoundError:
        raise error(f"{path}: {missing}{pattern_hint(path)}") from None
    except IsADirectoryError:
        raise error(f"{path}: is a folder; give a file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
    return text.replace("\r\n", "\n")


def decode_text(content: bytes, source: str | Path, error: type[FileError] = FileError, line: int = 1) -> str:
    """Bytes of UTF-8 text, from this line of their file, as a string without byte order mark.

    Raises:
        error: not UTF-8; the message names the line, what the bytes are instead, and a command that converts the file.
    """
    if line == 1:
        check_text(content[:HEAD], source, error)
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        raise error(not_utf8(problem, source, line)) from None


def check_text(head: bytes, source: str | Path, error: type[FileError] = FileError) -> None:
    """Checks the first bytes of a file, HEAD or fewer, that should be UTF-8 text.

    Raises:
        error: they are those of UTF-16 or UTF-32, of a compressed file or of a Git LFS pointer, or have NUL bytes.
    """
    argument = _argument(source)
    for magic, (kind, remedy) in _BINARY.items():
        if head.startswith(magic):
            raise error(f"{source}: is {kind}; {remedy.format(argument)}")
    encoding = _wide_encoding(head)
    if encoding is not None:
        raise error(f"{source}: is {encoding} text, not UTF-8; {_ICONV.format(argument, encoding)}")
    if b"\0" in head:
        raise error(f"{source}: has NUL bytes, so it is not text; give a file in UTF-8")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 as the byte order mark, or zero bytes of ASCII characters, tell; None: neither."""
    for name, marks in _MARKS.items():
        if head.startswith(marks):
            return name
    numbers = [head[place::4].count(0) for place in range(4)]
    for name, empty in _ZEROS.items():
        others = [number for place, number in enumerate(numbers) if place not in empty]
        if min(numbers[place] for place in empty) > max(others) and _decodes(head, name):
            return name
    return None


def _decodes(content: bytes, encoding: str) -> bool:
    """Whether bytes are text in an encoding; the last character may be cut."""
    try:
        return "\0" not in codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return False


def _argument(source: str | Path) -> str:
    """A file as an argument of a command, after a space; "" for standard input, which commands read without a name."""
    return f" {shlex.quote(str(source))}" if Path(source).is_file() else ""


def not_utf8(problem: UnicodeDecodeError, source: str | Path, line: int) -> str:
    """Message for bytes of `source`, from its line `line`, that are not UTF-8."""
    content, start = problem.object, problem.start
    message = f"{source}:{line + content.count(bytes([10]), 0, start)}: not UTF-8 (byte 0x{content[start]:02x}); "
    try:  # the beginning of the file: the bytes may be one line of it
        with Path(source).open("rb") as file:
            content = file.read(_EXAMINED)
        start = len(content)
        content.decode("utf-8-sig")
    except UnicodeDecodeError as first:
        start = first.start
    except OSError:  # no file, for example standard input
        pass
    before = len(content[:start].translate(None, _ASCII))
    text = content.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    # One or two characters in GB18030 can be UTF-8 by chance, most of a text cannot.
    by_chance = before < _CHANCE and len(text) - len(text.encode("ascii", "ignore")) <= 2 * bad
    if by_chance and _decodes(content, "gb18030"):
        return message + f"it may be GB18030; {_ICONV.format(_argument(source), 'GB18030')}"
    if before:
        return message + "the text before it is UTF-8; write this line in UTF-8, too"
    return message + "convert the file to UTF-8"


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
        # Files that were joined have a byte order mark at the beginning of a line.
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_unique_keys, parse_float=_number)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
            raise RecursionError
    except json.JSONDecodeError as problem:
        if not text.strip("\ufeff \t\r\n"):
            raise error(f"{place}: empty; expected a JSON value{remedy}") from None
        place = f"{source}:{(line or 1) + problem.lineno - 1}"
        raise error(f"{place}: not valid JSON: {problem.msg} at column {problem.colno}{remedy}") from None
    except RecursionError:
        raise error(f"{place}: not valid JSON: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as problem:
        # Without Python's own advice about the number of digits.
        raise error(f"{place}: not valid JSON: {str(problem).partition('; use sys.')[0]}") from None
    return value


def _number(text: str) -> float:
    value = float(text)
    if value == 0 and not is_zero(text):
        raise ValueError(f"{text} is too small for a number, it would be 0")
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


def is_zero(number: str) -> bool:
    """Whether the text of a decimal number means 0, which also a number too small for a float becomes."""
    return not re.search("[1-9]", re.split("[eE]", number)[0])
