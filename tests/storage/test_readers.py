"""One reader for text and JSON: what it accepts, what it refuses, and how its errors name the place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.storage.readers import MAX_DEPTH, decode_text, parse_json, read_json, read_object, read_text


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
        (b"", ": empty; expected a JSON value"),
        (b'{"a": 1,\n "b" 2}', ":2: not valid JSON: .* at column 6"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', ': not valid JSON: key "c" twice in one object'),
        (b'{"a":\n"\xff"}', ":2: not UTF-8 .byte 0xff.; convert the file"),
        (b"[" * 100_000, "not valid JSON: nested more than"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "not valid JSON: nested more than"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "not valid JSON: nested more than"),
        (b"9" * 5000, "not valid JSON: .*value has 5000 digits$"),
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


CHINESE = '{"a": "蓝色裤子，第一款。"}\n'


def decoded_values(path: Path) -> list[str]:
    return [decode_text(raw.text, path, FileError, raw.line) for raw in raw_values(path)]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv here")
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("gb18030", b""), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("utf-16-le", b""),
        ("utf-16-be", b""), ("utf-32-le", b"\xff\xfe\0\0"), ("utf-32-be", b"\0\0\xfe\xff"), ("utf-32-le", b""),
        ("utf-32-be", b"")
    ]
)  # fmt: skip
@pytest.mark.parametrize("read", [read_text, decoded_values])
def test_the_command_of_the_message_converts_the_file(file, encoding: str, mark: bytes, read) -> None:
    path = file(mark + (CHINESE * 3).encode(encoding))
    path = path.rename(path.with_name("a b'c.json"))
    with pytest.raises(FileError, match="UTF-8") as error:
        read(path)
    _, found, command = str(error.value).partition("what this command writes: ")
    assert found, error.value
    converted = subprocess.run(command, shell=True, capture_output=True, check=True, timeout=60).stdout
    assert converted.decode("utf-8") == CHINESE * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip; use what this command writes: gzip -cd .*a.json"),
        (bz2.compress(b"{}"), "is compressed with bzip2; use what"),
        (lzma.compress(b"{}"), "is compressed with xz; use what"),
        (b"PK\x03\x04" + bytes(9), "is a zip archive; give a file in it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer; fetch the file: git lfs pull"),
        (bytes(50), "has NUL bytes, so it is not text"),
        (b'{"a": 1}\0\0\0', "has NUL bytes, so it is not text"),
        ("café".encode("latin-1") + b" ", ":1: not UTF-8 .byte 0xe9.; convert the file to UTF-8"),
        # The bytes of these characters are UTF-8 by chance.
        ("模型".encode("gb18030"), ":1: not UTF-8 .byte 0xd0.; it may be GB18030; use what"),
        ("\n模模型".encode("gb18030"), ":2: not UTF-8 .byte 0xd0.; it may be GB18030; use what"),
        (
            "中文\n".encode() + "中文".encode("gb18030"),
            ":2: not UTF-8 .*; the text before it is UTF-8; write this line",
        ),
    ],
)
def test_files_of_other_kinds_are_named(file, content: bytes, message: str) -> None:
    path = file(content)
    for read in (read_text, decoded_values):
        with pytest.raises(FileError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:")


def test_object_and_lines(file) -> None:
    with pytest.raises(FileError, match="expected a JSON object, found list"):
        read_object(file(b"[]"))
    with pytest.raises(FileError, match=r"^prompts:7: not valid JSON: .* at column 2; write one"):
        parse_json("[", "prompts", line=7, remedy="; write one")
    joined = file(b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert [parse_value(raw, joined) for raw in raw_values(joined)] == [{"a": 1}, {"a": 2}]
    path = file(b'{"a": 1}\n{"a": 1, "a": 2}\n')
    first, second = raw_values(path)
    assert parse_value(first, path) == {"a": 1}
    with pytest.raises(FileError, match=':2: not valid JSON: key "a" twice'):
        parse_value(second, path)
