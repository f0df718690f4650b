"""Reading record files: what is accepted, and how each fault is reported."""

from __future__ import annotations

import json

import pytest
from data_helpers import read_records

from glm_ms.storage.errors import DataError

COLUMNS = ("content", "summary")
GOOD = '{"content": "甲", "summary": "乙"}'


def _texts(path, columns=COLUMNS):
    return [(record.prompt, record.response, record.line) for record in read_records(path, columns)]


def test_json_lines(records_file):
    path = records_file(f'{GOOD}\r\n\n  {{"content": "a\\nb\u2028c", "summary": "s", "more": 1}}  \n{GOOD}')
    assert _texts(path) == [("甲", "乙", 1), ("a\nb\u2028c", "s", 3), ("甲", "乙", 4)]


def test_array(records_file):
    objects = [{"content": f"c{i}", "summary": "s"} for i in range(3)]
    for text in (json.dumps(objects, indent=2), json.dumps(objects), "\n " + json.dumps(objects) + "\n\n"):
        assert [prompt for prompt, _, _ in _texts(records_file(text))] == ["c0", "c1", "c2"]
    assert [line for _, _, line in _texts(records_file(json.dumps(objects, indent=2)))] == [2, 6, 10]


def test_byte_order_mark(records_file):
    mark = b"\xef\xbb\xbf"
    assert _texts(records_file(mark + GOOD.encode())) == [("甲", "乙", 1)]
    assert _texts(records_file(mark + f"[{GOOD}]".encode())) == [("甲", "乙", 1)]


def test_empty_and_null_are_skipped(records_file):
    lines = [GOOD, '{"content": "", "summary": "x"}', '{"content": "x", "summary": null}', GOOD]
    for text in ("\n".join(lines), "[" + ",".join(lines) + "]"):
        assert [line for _, _, line in _texts(records_file(text))] == ([1, 4] if "[" not in text else [1, 1])


def test_reads_lazily(records_file):
    records = iter(read_records(records_file(f"{GOOD}\nbroken\n"), COLUMNS))
    assert next(records).prompt == "甲"
    with pytest.raises(DataError, match=":2: not valid JSON"):
        next(records)


def test_history_column(records_file):
    columns = ("content", "summary", "history")
    path = records_file(
        [
            {"content": "a", "summary": "b", "history": [["c", "d"], ["e", "f"]]},
            {"content": "a", "summary": "b", "history": []},
            {"content": "a", "summary": "b", "history": None},
        ]
    )
    assert [record.history for record in read_records(path, columns)] == [(("c", "d"), ("e", "f")), (), ()]
    for history in ("x", [["c"]], ["cd"], 0, {}):
        path = records_file([{"content": "a", "summary": "b", "history": history}])
        with pytest.raises(DataError, match=r":1: column 'history' must be a list of \[prompt, response\]"):
            list(read_records(path, columns))
    path = records_file([{"content": "a", "summary": "b", "history": [["c", 1]]}])
    with pytest.raises(DataError, match=":1: column 'history' must be a string, found int"):
        list(read_records(path, columns))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{GOOD}\n{{"content": "x"', r":2: not valid JSON: .* at column \d+; each line"),
        (f"{GOOD}{GOOD}", ":1: not valid JSON: Extra data"),
        ("{\n", ":1: not valid JSON"),
        (f"{GOOD}\n[1]", r":2: a record must be a JSON object .* found list"),
        ("null", ":1: .* found NoneType"),
        (f"[{GOOD},\n3]", ":2: a record must be a JSON object .* found int"),
        (f"[{GOOD},\n\n]", ":3: not valid JSON"),
        (f"[{GOOD}\n{GOOD}]", ":2: not valid JSON: expected ',' or ']'"),
        (f"[{GOOD}\n", ":2: not valid JSON: expected ',' or ']'"),
        ("[", "not valid JSON"),
        (f"[{GOOD}]\n{GOOD}", ":2: text after the end"),
        ("\n[" + "[" * 100000, ":2: not valid JSON"),
        ("[" * 100000, ":1: not valid JSON"),
        ('{"a": ' * 100000, ":1: not valid JSON"),
        (f'{GOOD}\n{{"content": "x", "sumary": "y"}}', ":2: no column 'summary', .* did you mean sumary"),
        ("{}", ":1: no column 'content', the record has none"),
        ('{"content": 5, "summary": "y"}', ":1: column 'content' must be a string, found int: 5"),
        ('{"content": ["x"], "summary": "y"}', ":1: column 'content' must be a string, found list"),
        ('{"content": false, "summary": "y"}', ":1: column 'content' must be a string, found bool"),
        ('{"content": "a\\ud83d", "summary": "y"}', ":1: column 'content' has half of a surrogate pair"),
        (GOOD.encode() + b"\n\n" + GOOD.encode("gb18030"), ":3: not UTF-8 .* iconv"),
        (b"[" + GOOD.encode() + b",\n" + GOOD.encode("gb18030") + b"]", ":2: not UTF-8"),
        (GOOD.encode("utf-16"), ":1: not UTF-8"),
    ],
)
def test_faults_name_file_and_line(records_file, content, message):
    path = records_file(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_records(path, COLUMNS))
    assert str(caught.value).startswith(str(path))


def test_files_that_cannot_be_read(records_file, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_records(tmp_path / "absent.json", COLUMNS))
    with pytest.raises(DataError, match="is a folder"):
        list(read_records(tmp_path, COLUMNS))
    for columns in ("content", ("content",), ("a", "b", "c", "d")):
        with pytest.raises(DataError, match="must name prompt and response"):
            list(read_records(records_file(GOOD), columns))
