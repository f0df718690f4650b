"""One reader for text and JSON: what it accepts, what it refuses, and how its errors name the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.storage.readers import MAX_DEPTH, parse_json, read_json, read_object, read_text


@pytest.fixture
def file(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "a.json"
        path.write_bytes(content)
        return path

    return write


def test_byte_order_mark_and_line_ends(file) -> None:
    assert read_text(file(b"\xef\xbb\xbfa\r\nb\rc\n")) == "a\nb\rc\n"
    assert read_json(file(b'\xef\xbb\xbf{"a": [1, 2.5, null]}')) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: not valid JSON: Expecting value at column 1"),
        (b'{"a": 1,\n "b" 2}', ":2: not valid JSON: .* at column 6"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', ': not valid JSON: key "c" twice in one object'),
        (b'{"a":\n"\xff"}', ":2: not UTF-8 .byte 0xff.; convert the file, for example: iconv .* a.json"),
        (b"[" * 100_000, "not valid JSON: nested more than"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "not valid JSON: nested more than"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "not valid JSON: nested more than"),
        (b"9" * 5000, "not valid JSON: "),
    ],
)
def test_refused_content(file, content: bytes, message: str) -> None:
    path = file(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_json(path, CheckpointError)
    assert str(error.value).startswith(f"{path}:")


def test_brackets_in_text_and_deep_but_allowed_values(file) -> None:
    assert read_json(file(json.dumps(["[{" * 1000]).encode())) == ["[{" * 1000]
    assert read_json(file(json.dumps([[]] * 1000).encode())) == [[]] * 1000
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(read_json(file(deep))).encode() == deep


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none: no such file$"):
        read_text(tmp_path / "none")
    with pytest.raises(CheckpointError, match="none: missing; make it"):
        read_object(tmp_path / "none", CheckpointError, "missing; make it")
    with pytest.raises(FileError, match="is a folder"):
        read_text(tmp_path)


def test_object_and_lines(file) -> None:
    with pytest.raises(FileError, match="expected a JSON object, found list"):
        read_object(file(b"[]"))
    with pytest.raises(FileError, match=r"^prompts:7: not valid JSON: .* at column 2; write one"):
        parse_json("[", "prompts", line=7, remedy="; write one")
    path = file(b'{"a": 1}\n{"a": 1, "a": 2}\n')
    first, second = raw_values(path)
    assert parse_value(first, path) == {"a": 1}
    with pytest.raises(FileError, match=':2: not valid JSON: key "a" twice'):
        parse_value(second, path)
