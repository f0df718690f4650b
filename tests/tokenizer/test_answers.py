"""Answers in pieces: the text and calls of the whole answer, whatever the pieces are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from glm_ms.tokenizer import AnswerParser, ChatGLM2Tokenizer, ChatGLM3Tokenizer, Text, ToolCall
from glm_ms.tokenizer.chatglm3 import tool_names

TOOLS = ["get_weather", "查询天气", "get_time"]
SYSTEM = {"role": "system", "content": "", "tools": TOOLS}
CALL = "get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
ARGUMENTS = '{"city": "北京", "days": 3}'
ANSWERS = {
    "你好": [Text("你好")],
    "\n 你好！\n\n再见 \n": [Text("你好！\n\n再见")],
    "": [],
    " \n ": [],
    CALL: [ToolCall("get_weather", ARGUMENTS)],
    f" {CALL} ": [ToolCall("get_weather", ARGUMENTS)],
    f"\n 我来查\n <|assistant|> {CALL}": [Text("我来查"), ToolCall("get_weather", ARGUMENTS)],
    f"{CALL}<|assistant|>get_time\ntool_call()<|assistant|>\n 好": [
        ToolCall("get_weather", ARGUMENTS),
        ToolCall("get_time", "{}"),
        Text("好"),
    ],
    '查询天气\n{"city": "北京", "metric": true}': [ToolCall("查询天气", '{"city": "北京", "metric": true}')],
    "\n[[训练时间]]一[[训练时间]二": [Text("2023年一[[训练时间]二")],
    "\na<|assistant|>\n b<|assistant|>": [Text("a\nb")],
    "a < b <|user| and <|assistant": [Text("a < b <|user| and <|assistant")],
    "get\nup": [Text("get\nup")],
    "get_weather": [Text("get_weather")],
    "Yes\n\n```python\nprint()\n``` runs": None,  # text with a reason, see below
}


def parts_of(parser: AnswerParser, pieces: Sequence[str]) -> list[Text | ToolCall]:
    """All parts, adjacent plain texts joined."""
    parts: list[Text | ToolCall] = []
    for part in [found for piece in pieces for found in parser.push(piece)] + parser.close():
        if parts and isinstance(part, Text) and isinstance(parts[-1], Text) and parts[-1].reason is part.reason is None:
            parts[-1] = Text(parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def cuts(answer: str) -> list[list[str]]:
    """An answer whole, character by character, and in random pieces."""
    rng = random.Random(answer)
    found = [[answer], list(answer)]
    for _ in range(10):
        places = sorted(rng.randrange(len(answer) + 1) for _ in range(4))
        found.append([answer[i:j] for i, j in zip([0, *places], [*places, len(answer)])])
    return found


@pytest.fixture(scope="module")
def glm3(small_vocabulary: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer(small_vocabulary)


@pytest.mark.parametrize("answer", [answer for answer, parts in ANSWERS.items() if parts is not None])
def test_parts_of_an_answer(glm3: ChatGLM3Tokenizer, answer: str) -> None:
    parser = glm3.answer_parser(TOOLS)
    for pieces in cuts(answer):
        assert parts_of(parser, pieces) == ANSWERS[answer], pieces


def test_parts_are_those_of_the_whole_answer(glm3: ChatGLM3Tokenizer) -> None:
    """The last text or the calls, as `process_response` and so the golden answers have them."""
    for answer, expected in ANSWERS.items():
        if expected is None:
            continue
        response, _ = glm3.process_response(answer, [SYSTEM])
        calls = [{"name": p.name, "parameters": json.loads(p.arguments)} for p in expected if isinstance(p, ToolCall)]
        if calls:
            assert response == (calls if len(calls) > 1 else calls[0])
        else:
            text = "".join(part.text for part in expected)
            assert text.endswith(response)
            assert "<|assistant|>" in answer or text == response


def test_golden_answers(golden: Path, glm3: ChatGLM3Tokenizer, small_vocabulary: Path) -> None:
    rows = json.loads((golden / "tokenizer_glm3.json").read_text(encoding="utf-8"))["process_response"]
    for row in rows:
        tools = tool_names(row["history"][0].get("tools"))
        for pieces in cuts(row["output"]):
            *_, last = parts_of(glm3.answer_parser(tools), pieces) or [Text("")]
            if isinstance(last, ToolCall):
                assert {"name": last.name, "parameters": json.loads(last.arguments)} == row["response"]
            elif isinstance(row["response"], str):
                assert last.text == row["response"]
            else:  # without tools code is text
                assert last.text == row["output"].strip()
    parser = ChatGLM2Tokenizer(small_vocabulary).answer_parser()
    for row in json.loads((golden / "tokenizer_glm2.json").read_text(encoding="utf-8"))["process_response"]:
        for pieces in cuts(row["output"]):
            assert "".join(part.text for part in parts_of(parser, pieces)) == row["response"]


def test_text_is_not_held_back(glm3: ChatGLM3Tokenizer) -> None:
    parser = glm3.answer_parser(TOOLS)
    assert parser.push("get_w") == []
    assert parser.push("et，") == [Text("get_wet，")]
    assert parser.push("好 \n") == [Text("好")]
    assert parser.push("[[训") == []
    assert parser.close() == [Text(" \n[[训")]
    plain = glm3.answer_parser()
    assert plain.push("get_weather") == [Text("get_weather")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("get_weather\n```python\ntool_call(city=where())\n```", "not a call"),
        ("get_weather\n```python\ntool_call(city='北", "not a call"),
        ("get_weather\n今天晴", "not a call"),
        ('get_weather\n{"city":', "not valid JSON"),
        ('get_weather\n{"a": 1, "a": 2}', "twice"),
        ("get_weather\ntool_call(a=1e999)", "JSON"),
        ("get_weather\ntool_call(a=b'x')", "JSON has no bytes"),
        ("get_weather\ntool_call(a='\\ud83d')", "JSON"),
        ("get_weather\ntool_call(a=0x" + "f" * 5000 + ")", "JSON"),
        ("get_weather\ntool_call(a={(1, 2): 3})", "JSON"),
        ("get_weather\ntool_call(a=" + "[" * 5000 + ")", "not a call"),
        ("open_door\n```python\ntool_call()\n```", "'open_door', which is none of its tools"),
        ("Yes\n\n```python\nprint()\n``` runs", "'Yes', which is none of its tools"),
    ],
)
def test_calls_that_cannot_be_read_are_text_with_the_reason(glm3: ChatGLM3Tokenizer, answer: str, reason: str) -> None:
    for pieces in [[answer]] if len(answer) > 1000 else cuts(answer):
        for before in ([], ["\n先说", "<|assistant|>"]):
            *text, last = parts_of(glm3.answer_parser(TOOLS), [*before, *pieces])
            assert isinstance(last, Text)
            assert last.text == ("\n" if before else "") + answer
            assert reason in (last.reason or "")
            assert text == ([Text("先说")] if before else [])


def test_values_of_python_in_json(glm3: ChatGLM3Tokenizer) -> None:
    (call,) = parts_of(glm3.answer_parser(TOOLS), ["get_time\ntool_call(a=(1, 2), b={3}, c=None, d={1: 'x'}, e=True)"])
    assert call == ToolCall("get_time", '{"a": [1, 2], "b": [3], "c": null, "d": {"1": "x"}, "e": true}')


def test_a_model_without_tools(small_vocabulary: Path) -> None:
    for tok in (ChatGLM2Tokenizer(small_vocabulary), ChatGLM3Tokenizer(small_vocabulary, template="plain")):
        assert parts_of(tok.answer_parser(), list(f" {CALL}<|assistant|>")) == [Text(f"{CALL}<|assistant|>")]
        with pytest.raises(ValueError, match=f"tools: {type(tok).__name__} .*knows none"):
            tok.answer_parser(TOOLS)


def test_names_of_tools() -> None:
    assert tool_names([{"name": "a"}, {"type": "function", "function": {"name": "b"}}, "c", {}]) == ["a", "b", "c"]
    assert tool_names({"name": "a", "parameters": {}}) == ["a"]
    assert tool_names({"a": {"description": ""}, "b": {}}) == ["a", "b"]
    assert tool_names(None) == tool_names([]) == []


def test_answers_as_messages(glm3: ChatGLM3Tokenizer) -> None:
    two = f"{CALL}<|assistant|>查询天气\ntool_call()"
    answer, messages = glm3.process_response(two, [SYSTEM])
    assert answer == [{"name": "get_weather", "parameters": {"city": "北京", "days": 3}},
                      {"name": "查询天气", "parameters": {}}]  # fmt: skip
    assert [message["metadata"] for message in messages[1:]] == ["get_weather", "查询天气"]
    assert glm3.process_response("你好，\n我在。", [])[0] == "你好，\n我在。"
    assert glm3.process_response("你好，\n我在。", [])[1][0]["metadata"] == ""
    with pytest.warns(UserWarning, match="cannot be read: not a call"):
        answer, messages = glm3.process_response("get_time\ntool_call(1)", [SYSTEM])
    assert answer == "get_time\ntool_call(1)"
    assert messages[1:] == [{"role": "assistant", "metadata": "get_time", "content": "tool_call(1)"}]
