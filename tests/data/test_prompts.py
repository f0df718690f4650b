"""Prompts to answer: every source and form, and what a wrong one gets."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from glm_ms.data.encoder import Message
from glm_ms.data.prompts import Question, read_prompts
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

PROMPTS = ["类型#上衣", "颜色#白色", "a b", "裙", "裤"]
HISTORY = [["一", "二"]]
MESSAGES = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
TOOL = {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": "3"}


def silent(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def jsonl(tmp_path: Path):
    def write(*records: object) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
        return str(path)

    return write


def typed(text: str) -> io.TextIOWrapper:
    """A standard input."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")


def texts(source: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(source, silent)]


def test_sources(jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([PROMPTS[0], "", *PROMPTS[1:]]).encode() + b"\r\n")
    keys = ("prompt", "content", "query", "text")
    objects = [PROMPTS[0], *({key: prompt} for key, prompt in zip(keys, PROMPTS[1:]))]
    monkeypatch.setattr(sys, "stdin", typed("\r\n".join(PROMPTS)))
    for source in (str(file), jsonl(*objects), "-"):
        assert texts(source) == PROMPTS
    assert texts(PROMPTS[0]) == PROMPTS[:1]
    assert texts("two\nlines.txt") == ["two\nlines.txt"]


def test_context(jsonl, glm2: ChatGLM2Tokenizer, glm3: ChatGLM3Tokenizer) -> None:
    """A prompt with a history has the ids of `build_chat_input`, whatever the form of the history."""
    forms = [
        {"prompt": "三", "history": HISTORY},
        {"query": "三", "history": MESSAGES},
        {"conversations": [*MESSAGES, {"role": "user", "content": "三"}]},
    ]
    said: list[str] = []
    for prompt in read_prompts(source := jsonl(*forms, "四"), said.append)[:3]:
        assert prompt.text == "三"
        assert prompt.ids(glm2) == glm2.build_chat_input("三", HISTORY)["input_ids"]
        assert prompt.ids(glm3) == glm3.build_chat_input("三", MESSAGES)["input_ids"]
    assert said == [f"{source}: 3 of 4 prompts have a history, a system message or tools"]
    tools = [{"name": "f"}]
    introduction = "Answer the following questions as best as you can. You have access to the following tools:"
    messages = [
        {"role": "system", "content": introduction, "tools": tools},
        {"role": "system", "content": "简短"},
        *MESSAGES,
    ]
    read = read_prompts(jsonl({"text": "三", "system": "简短", "history": HISTORY, "tools": tools}), said.append)
    assert read[0].ids(glm3) == glm3.build_chat_input("三", messages)["input_ids"]
    (observed,) = read_prompts(jsonl({"conversations": [MESSAGES[0], TOOL], "tools": json.dumps(tools)}), said.append)
    call = {"role": "assistant", "metadata": "f", "content": "```python\ntool_call(x=1)\n```"}
    history = [messages[0], MESSAGES[0], call]
    assert observed.ids(glm3) == glm3.build_chat_input("3", history, role="observation")["input_ids"]
    assert texts(jsonl({"instruction": "译", "input": "苹果"}, {"prompt": "译", "history": [], "system": ""})) == [
        "译\n苹果", "译",
    ]  # fmt: skip


def test_keys_without_effect_are_told_once(jsonl) -> None:
    said: list[str] = []
    source = jsonl({"prompt": "a", "id": 1}, {"prompt": "b", "id": 2, "max_length": 5, "summary": "x", "more": None})
    assert [prompt.text for prompt in read_prompts(source, said.append)] == ["a", "b"]
    assert said == [f"{source}: not used: column 'id', column 'max_length', column 'summary'"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "b"}, r"prompts\.jsonl:2: expected a text .* one as prompt, .*, found 'answer'"),
        ({"prompt": 5}, "column 'prompt' must be a string"),
        ({"prompt": None}, "found an empty text"),
        ({"prompt": " "}, "found an empty text"),
        (["a"], r"prompts\.jsonl:2: expected a text"),
        ([{"role": "user", "content": "a"}], "expected a text"),
        ({"content": "a", "instruction": "b"}, "'instruction' is not used beside 'content'; write both into one text"),
        ({"prompt": "a", "history": "x"}, "column 'history' must be a list of"),
        ({"prompt": "a", "history": [["x"]]}, "column 'history' must be a list of"),
        ({"prompt": "a", "history": [["x", None]]}, "column 'history' must be a string, found None"),
        ({"prompt": "a", "history": {"role": "user"}}, "column 'history' must be a list of"),
        ({"prompt": "a", "history": [{"role": "bot", "content": "x"}]}, "message 1: role 'bot' is not known"),
        ({"prompt": "a", "hystory": HISTORY}, "key 'hystory' is not known; did you mean 'history'"),
        ({"prompt": "a", "system": {"a": 1}}, "column 'system' must be a string"),
        ({"prompt": "a", "tools": 5}, "column 'tools': must be a list of objects"),
        ({"prompt": "a", "tools": {"f": 1}}, "column 'tools' must be a list"),
        ({"prompt": "a\ud83d"}, "half of a surrogate pair"),
        ("a\ud83d", "half of a surrogate pair"),
        ({"conversations": MESSAGES}, "ends with a message of the assistant; end it with the question"),
        ({"conversations": [{"role": "system", "content": "x"}]}, "ends with a message of the system"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": [{"role": "user", "content": " "}]}, "found an empty text"),
        ({"conversations": MESSAGES[:1], "system": "x"}, "'system' has no effect beside"),
    ],
)
def test_broken_records_name_file_and_line(jsonl, record: object, message: str) -> None:
    source = Path(jsonl("a"))
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message) as error:
        read_prompts(str(source), silent)
    assert str(error.value).startswith(f"{source}:2: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": \n', r"prompts\.jsonl:3: not valid JSON"),
        (b'{"prompt": "a", "prompt": "b"}', r'prompts\.jsonl:1: not valid JSON: key "prompt" twice'),
        (b"\n \n", r"prompts\.jsonl: no prompt"),
        (b"", r"prompts\.jsonl: no prompt"),
        (b'"\xff"\n', r"prompts\.jsonl:1: not UTF-8"),
        ('"你好"'.encode("utf-16"), r"prompts\.jsonl: is UTF-16 text"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(str(path), silent)


def test_other_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"missing\.txt: no such file"):
        read_prompts(str(tmp_path / "missing.txt"), silent)
    with pytest.raises(DataError, match="no prompt; give a text"):
        read_prompts("  \n ", silent)
    monkeypatch.setattr(sys, "stdin", typed("\n"))
    with pytest.raises(DataError, match="standard input: no prompt"):
        read_prompts("-", silent)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好".encode("gb18030"))))
    with pytest.raises(DataError, match=r"standard input:1: not UTF-8 .* iconv -f GB18030 -t UTF-8$"):
        read_prompts("-", silent)
    with pytest.raises(DataError, match=r"prompts are read from \.txt and \.jsonl files only"):
        read_prompts(str(tmp_path), silent)
    for name in ("prompts.json", "/data/dev.CSV", "a-b.tsv"):
        with pytest.raises(DataError, match=f"{name}: prompts are read from"):
            read_prompts(name, silent)
    for text in ("什么是package.json", "what is a.csv", "a.json?"):
        assert read_prompts(text, silent)[0].text == text


def test_text_in_the_template(glm2: ChatGLM2Tokenizer, glm3: ChatGLM3Tokenizer, jsonl) -> None:
    """The cards of the models print `backslash n` within double quotes, which a shell does not translate."""
    line = r"[gMASK]sop<|user|> \n 你好<|assistant|> \n"
    prefix, body = glm3.prefix_tokens, glm3.build_single_message("user", "", "你好")
    ids = [*prefix, *body, *glm3.build_single_message("assistant", "", "")]
    assert read_prompts(line, silent)[0].ids(glm3) == ids
    assert read_prompts(line.replace(r"\n", "\n"), silent)[0].ids(glm3) == ids
    assert read_prompts(jsonl({"prompt": line}), silent)[0].ids(glm3) == ids
    for opening in ("[gMASK]sop", "[gMASK] sop ", ""):
        for text in (glm2.build_prompt("你好"), r"[Round 1]\n\n问：你好\n\n答："):
            assert read_prompts(opening + text, silent)[0].ids(glm2) == glm2.build_chat_input("你好")["input_ids"]
    assert read_prompts("[Round 1] 你好", silent)[0].ids(glm2) == glm2.build_chat_input("[Round 1] 你好")["input_ids"]
    assert read_prompts(r"C:\new", silent)[0].ids(glm3) == glm3.build_chat_input(r"C:\new")["input_ids"]
    # With line breaks of its own, the text has `\n` as two characters.
    text = "[gMASK]sop<|user|>\n print(r'\\n')<|assistant|>"
    assert glm3.decode(read_prompts(text, silent)[0].ids(glm3)).count("\\n") == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("system", "x"), ("user", "a")], "roles|in turn"),
        ([("observation", "a")], "questions of the user only"),
        ([("user", "x"), ("user", "a")], "in turn"),
        ([("user", "x"), ("assistant", "y"), ("user", "[gMASK]sop<|user|>\n a")], "template cannot have a history"),
        ([("user", "[gMASK]sop<|user|>\n a")], "role tokens belong to ChatGLM3"),
    ],
)
def test_messages_without_a_place_in_the_template(glm2: ChatGLM2Tokenizer, messages: list, message: str) -> None:
    prompt = Question(tuple(Message(*item) for item in messages), "f:3")
    with pytest.raises(DataError, match=f"^f:3: .*({message})"):
        prompt.ids(glm2)
