"""Reading record files: what is accepted, and how each fault is reported."""

from __future__ import annotations

import json

import pytest
from data_helpers import adgen_prompts, adgen_rows, conversation_encoder, read_messages, read_records

from glm_ms.data.cache import CacheRequest
from glm_ms.data.encoder import Message
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
        (GOOD.encode() + b"\n\n" + GOOD.encode("gb18030"), ":3: not UTF-8 .*; the text before it is UTF-8"),
        (b"[" + GOOD.encode() + b",\n" + GOOD.encode("gb18030") + b"]", ":2: not UTF-8"),
        (GOOD.encode("utf-16"), ": is UTF-16 text, not UTF-8; .* iconv"),
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


ALPACA = {"instruction": "译成英文", "input": "苹果", "output": "apple"}
DIALOGUE = {"content": "多少钱？", "summary": "两百元。"}
PAIRS, ROUNDS = [["一", "二"]], [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
TOOLS = [{"name": "f", "说明": "x"}]


def test_the_context_of_a_prompt():
    last = (Message("user", "多少钱？"), Message("assistant", "两百元。", loss=True))
    earlier = (Message("user", "一"), Message("assistant", "二", loss=True))
    for history in (PAIRS, ROUNDS):
        record = {**DIALOGUE, "history": history}
        assert read_messages(record, history_column="history") == (*earlier, *last)
        assert read_messages(record, ("content", "summary", "history")) == (*earlier, *last)
    whole = {**DIALOGUE, "history": PAIRS, "system": "简短", "tools": TOOLS}
    names = {"history_column": "history", "system_column": "system", "tools_column": "tools"}
    tools, *others = read_messages(whole, **names)
    assert others == [Message("system", "简短"), *earlier, *last]
    assert tools.role == "system"
    assert tools.content.endswith("following tools:\n" + json.dumps(TOOLS, indent=4, ensure_ascii=False))
    assert read_messages({**whole, "tools": json.dumps(TOOLS)}, **names)[0] == tools
    for empty in (
        DIALOGUE,
        {**DIALOGUE, "history": [], "system": "", "tools": None},
        {**DIALOGUE, "tools": []},
        {**DIALOGUE, "tools": " [] "},
        {**DIALOGUE, "history": ""},
    ):
        assert read_messages(empty, **names) == last
        assert read_messages(empty) == last


def test_alpaca():
    read = read_messages(ALPACA, ("instruction", "output"), input_column="input")
    assert [message.content for message in read] == ["译成英文\n苹果", "apple"]
    for record in ({**ALPACA, "input": ""}, {"instruction": "译成英文", "output": "apple"}):
        assert read_messages(record, ("instruction", "output"), input_column="input")[0].content == "译成英文"
        assert read_messages(record, ("instruction", "output"))[0].content == "译成英文"
    assert read_messages(ALPACA, ("instruction", "input"), system_column="output")  # any names


@pytest.mark.parametrize(
    ("record", "columns", "others", "message"),
    [
        (ALPACA, COLUMNS, {}, "the record has 'instruction', 'input', 'output'; name the columns .* in origin_col"),
        (ALPACA, ("instruction", "output"), {}, "column 'input' is not used; set input_column: input, .* or remove it"),
        (ALPACA, ("input", "output"), {}, r"column 'instruction' is not used; set origin_columns: \[instruction"),
        (ALPACA, ("instruction", "input", "output"), {}, "column 'output' must be a list of .prompt, response. pairs"),
        ({**DIALOGUE, "history": PAIRS}, COLUMNS, {}, "column 'history' is not used; name it as the third of"),
        ({**DIALOGUE, "history": "x"}, COLUMNS, {}, "column 'history' is not used"),
        ({**DIALOGUE, "system": "x"}, COLUMNS, {}, "column 'system' is not used; set system_column: system"),
        ({**DIALOGUE, "tools": TOOLS}, COLUMNS, {}, "column 'tools' is not used; set tools_column: tools"),
        ({**DIALOGUE, "system": ["x"]}, COLUMNS, {"system_column": "system"}, "column 'system' must be a string"),
        ({**DIALOGUE, "tools": 5}, COLUMNS, {"tools_column": "tools"}, "column 'tools': must be a list of objects"),
        ({**DIALOGUE, "tools": {"f": {}}}, COLUMNS, {"tools_column": "tools"}, "'tools' must be a list of tools"),
        ({**DIALOGUE, "histroy": PAIRS}, COLUMNS, {"history_column": "history"}, "no column 'history', .*mean histroy"),
        (
            {**DIALOGUE, "h": [{"role": "usr", "content": "x"}]}, COLUMNS, {"history_column": "h"},
            "column 'h': message 1: role 'usr' is not known; did you mean user",
        ),
        (
            {**DIALOGUE, "h": [{"role": "user", "content": None}]}, COLUMNS, {"history_column": "h"},
            "column 'h': message 1: 'content' must be a string",
        ),
        ({**DIALOGUE, "h": [["a", "b"], ROUNDS[0]]}, COLUMNS, {"history_column": "h"}, "column 'h' must be a list of"),
    ]
)  # fmt: skip
def test_context_that_would_be_lost_is_refused(record, columns, others, message):
    with pytest.raises(DataError, match=message) as caught:
        read_messages(record, columns, **others)
    assert str(caught.value).startswith("f:3: ")


def test_columns_with_two_meanings():
    for columns, others, message in (
        (("a", "a"), {}, "column 'a' is named twice"),
        (("a", "b"), {"system_column": "b"}, "column 'b' is named twice"),
        (("a", "b", "c"), {"history_column": "d"}, "origin_columns names 'c' for the history, too"),
    ):
        with pytest.raises(DataError, match=message):
            read_messages({}, columns, **others)
    assert read_messages({"a": "x", "b": "y", "c": PAIRS}, ("a", "b", "c"), history_column="c")


def test_columns_without_effect_are_told_by_name(records_file, glm2, tmp_path):
    path = records_file(
        [DIALOGUE, {**DIALOGUE, "id": 3, "说明": "x", "history": []}, {**DIALOGUE, "id": 4, "topic": ""}]
    )
    line = "3 records used; not used: column 'id', column '说明'"
    for cache in (None, CacheRequest(tmp_path / "cache"), CacheRequest(tmp_path / "cache")):
        assert line in adgen_rows(path, glm2, cache=cache).describe()
    assert line in adgen_prompts(path, glm2).describe()
    assert "not used" not in adgen_rows(records_file([DIALOGUE], "plain.json"), glm2).describe()


def test_a_plain_prompt_has_no_context(records_file, glm2, glm3):
    for tokenizer in (glm2, glm3):
        plain = type(tokenizer)(tokenizer.vocab_file, template="plain")
        for record, columns in (
            ({**DIALOGUE, "h": PAIRS}, {"history_column": "h"}),
            ({**DIALOGUE, "s": "简短"}, {"system_column": "s"}),
        ):
            with pytest.raises(DataError, match=r"json:1: a plain prompt has no history, system message or tools"):
                adgen_rows(records_file([record]), plain, **columns)
    with pytest.raises(DataError, match="ConversationDataLoader needs a chat template"):
        conversation_encoder(plain, 31, 32)


def test_a_family_without_roles_refuses_them(records_file, glm2):
    path = records_file([{**DIALOGUE, "s": "简短"}])
    with pytest.raises(DataError, match=r"records.json:1: ChatGLM2Tokenizer has no roles"):
        adgen_rows(path, glm2, system_column="s")
