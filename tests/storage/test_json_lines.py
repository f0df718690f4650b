"""Values of JSON files with their places: chunks of any size, random access, files that change."""

from __future__ import annotations

import json
import os
import pickle
import threading

import pytest

from glm_ms.storage import json_lines as module
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import JsonFile, RawValue, parse_value, raw_values

VALUES = [
    {"a": "甲\n乙", "b": [1, {"c": '}]\\"'}]},
    {},
    {"text": "字" * 50},
    12345,
    "😀",
    [[]],
    True,
    None,
    -1.5e3,
]


@pytest.fixture
def records_file(tmp_path):
    def write(content):
        path = tmp_path / "records.json"
        if isinstance(content, list):
            content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", request.param)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_in_chunks_of_any_size(records_file, chunk, indent, mark):
    path = records_file(mark + f"\n {json.dumps(VALUES, indent=indent, ensure_ascii=False)}\n\n".encode())
    content = path.read_bytes()
    found = list(raw_values(path))
    assert [parse_value(raw, path) for raw in found] == VALUES
    for raw in found:
        assert content[raw.start : raw.start + len(raw.text)] == raw.text
        assert raw.line == content[: raw.start].count(b"\n") + 1


def test_lines(records_file):
    lines = [json.dumps(value, ensure_ascii=False) for value in VALUES[:2]]
    path = records_file(f"\r\n{lines[0]}\r\n \t \n  {lines[1]}")
    content = path.read_bytes()
    found = list(raw_values(path))
    assert [(raw.line, parse_value(raw, path)) for raw in found] == [(2, VALUES[0]), (4, VALUES[1])]
    assert all(content[raw.start : raw.start + len(raw.text)] == raw.text for raw in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", ":1: not valid JSON: expected ',' or ']'"),
        ('[1,\n"ab', ":2: not valid JSON: Unterminated string"),
        ('[{"a": 1},\n{"b" 2}, {"c": 3}]', ":2: not valid JSON: Expecting ':'"),
        ("[1,\n\n]", ":3: not valid JSON: Expecting value"),
        ('["\\ud83d\\q"]', ":1: not valid JSON: Invalid"),
        ("[1]\n\n x", ":3: text after the end"),
        (b'["a",\n"b\xff"]', ":2: not UTF-8 .byte 0xff"),
        (b'["a",\n"b\xe5', ":2: not UTF-8"),
    ],
)
def test_faults_of_arrays_name_the_line(records_file, chunk, content, message):
    path = records_file(content)
    with pytest.raises(DataError, match=message):
        list(raw_values(path))


def test_a_fault_is_told_before_the_rest_is_read(records_file, monkeypatch):
    """An array of any size is read up to its fault, not into memory to its end."""
    monkeypatch.setattr(module, "_CHUNK", 64)
    path = records_file('[{"a" 1}, ' + "1, " * 5000 + "1]")
    read = []
    window = module._Window

    class Watched(window):
        def _grow(self):
            read.append(len(self.text))
            return super()._grow()

    monkeypatch.setattr(module, "_Window", Watched)
    with pytest.raises(DataError, match=":1: not valid JSON"):
        list(raw_values(path))
    assert max(read) < 200
    assert len(list(raw_values(records_file("[" + "1, " * 5000 + "1]")))) == 5001
    assert max(read) < 200


@pytest.mark.parametrize("as_array", [False, True])
def test_values_by_number(records_file, as_array):
    values = [{"n": number, "text": "甲" * number} for number in range(50)]
    file = JsonFile(records_file(json.dumps(values) if as_array else values))
    for raw in file.raw_values():
        if parse_value(raw, file.path)["n"] % 2:
            file.append(raw)
    assert [file[number]["n"] for number in range(len(file))] == list(range(1, 50, 2))
    twin = pickle.loads(pickle.dumps(file))
    assert twin[3] == file[3] == values[7]
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.extend(file[n]["n"] == 2 * n + 1 for n in range(25))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 100


def test_a_file_that_changes_is_noticed(records_file):
    path = records_file(VALUES[:3])
    file = JsonFile(path)
    for raw in file.raw_values():
        file.append(raw)
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(DataError, match="has been changed since it was read first"):
        file[0]
    state = pickle.dumps(file)
    with pytest.raises(DataError, match="has been changed"):
        pickle.loads(state)
    with pytest.raises(DataError, match="has been changed"):
        next(file.raw_values())


def test_a_file_replaced_under_its_name_does_no_harm(records_file, tmp_path):
    path = records_file(VALUES[:3])
    file = JsonFile(path)
    for raw in file.raw_values():
        file.append(raw)
    other = tmp_path / "other.json"
    other.write_text("{}\n", encoding="utf-8")
    os.replace(other, path)
    assert file[0] == VALUES[0]


def test_a_raw_value_is_a_line_alone(records_file):
    path = records_file("x")
    with pytest.raises(DataError, match=r"records\.json:7: not valid JSON: Expecting .* at column 6;"):
        parse_value(RawValue(7, 0, b'  {"a": \n'), path)
