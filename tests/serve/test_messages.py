"""/v1/messages: the message, the events of a stream, blocks, errors of Anthropic's form."""

from __future__ import annotations

import json

import pytest
from serve.chat_helpers import CLOCK, WEATHER, called, events_of

URL = "/v1/messages"
HELLO = {"max_tokens": 100, "messages": [{"role": "user", "content": "hello there"}]}
TOOLS = [
    {"name": "get_weather", "description": "Weather of a city", "input_schema": WEATHER["function"]["parameters"]},
    {"name": CLOCK["function"]["name"], "input_schema": {"type": "object", "properties": {}}},
]


def post(client, body, status=200, url=URL, **more):
    response = client.post(url, json={**body, **more})
    assert response.status_code == status, response.text
    return response.json()


def test_a_text(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n the quick fox 🦊")
    found = post(client, HELLO, system=[{"type": "text", "text": "be short"}], temperature=0)
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
    assert found["content"] == [{"type": "text", "text": "the quick fox 🦊"}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    prompt = tokenizer.build_chat_input("hello there", [{"role": "system", "content": "be short"}])["input_ids"]
    assert speaker.prompts[-1] == prompt
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(prompt)
    assert usage["output_tokens"] == len(speaker.answer)


def test_why_an_answer_ends(chat):
    client, speaker = chat
    speaker.say("\n the quick brown fox")
    found = post(client, HELLO, max_tokens=4)
    assert found["stop_reason"] == "max_tokens"
    found = post(client, HELLO, stop_sequences=["brown"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "brown")
    assert found["content"][0]["text"] == "the quick "


def test_events_build_the_message(chat):
    client, speaker = chat
    speaker.say("\n the fox", called("get_weather", "city='北京'"), called("clock", ""), end="<|observation|>")
    events = events_of(client.post(URL, json={**HELLO, "tools": TOOLS, "stream": True, "temperature": 0}))
    assert all(name == value["type"] for name, value in events)
    values = [value for _, value in events]
    assert values[0]["type"] == "message_start"
    assert values[0]["message"]["content"] == []
    blocks, texts = [], []
    for value in values[1:-2]:
        kind = value["type"].removeprefix("content_block_")
        if kind == "start":
            assert value["index"] == len(blocks)
            blocks.append(dict(value["content_block"]))
            texts.append("")
        elif kind == "delta":
            assert value["index"] == len(blocks) - 1
            texts[-1] += value["delta"].get("text", "") + value["delta"].get("partial_json", "")
        else:
            assert kind == "stop"
    assert [block["type"] for block in blocks] == ["text", "tool_use", "tool_use"]
    assert texts[0] == "the fox"
    assert [json.loads(text) for text in texts[1:]] == [{"city": "北京"}, {}]
    assert values[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert values[-2]["usage"]["output_tokens"] == len(speaker.answer)
    assert values[-1] == {"type": "message_stop"}
    whole = post(client, HELLO, tools=TOOLS, temperature=0)
    assert [block.get("input") for block in whole["content"]] == [None, {"city": "北京"}, {}]


def test_a_round_with_results(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n hello", called("get_weather", "city='北京'"), end="<|observation|>")
    first = post(client, HELLO, tools=TOOLS, temperature=0)["content"]
    before = speaker.prompts[-1]
    result = {"type": "tool_result", "tool_use_id": first[1]["id"], "content": [{"type": "text", "text": "22"}]}
    reply = {"role": "user", "content": [result, {"type": "text", "text": "and?", "cache_control": {"type": "x"}}]}
    speaker.say("\n fox")
    messages = [*HELLO["messages"], {"role": "assistant", "content": first}, reply]
    post(client, HELLO, messages=messages, tools=TOOLS)
    said = " \n hello<|assistant|> get_weather\n ```python\ntool_call(city='北京')\n```"
    rest = "<|observation|> \n 22<|user|> \n and?<|assistant|>"
    assert tokenizer.decode(speaker.prompts[-1]) == tokenizer.decode(before) + said + rest
    count = post(client, {"messages": messages, "tools": TOOLS}, url=f"{URL}/count_tokens")
    assert count == {"input_tokens": len(speaker.prompts[-1])}


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "clock"}]
)
def test_a_call_that_must_come(chat, choice):
    client, speaker = chat
    speaker.say("\n no")
    found = post(client, HELLO, tools=TOOLS[1:], tool_choice=choice)
    assert found["stop_reason"] in ("tool_use", "max_tokens")
    assert {block["type"] for block in found["content"][:1]} == {"tool_use"}


def test_no_tools(chat):
    client, speaker = chat
    speaker.say("\n no")
    post(client, HELLO, tools=TOOLS, tool_choice={"type": "none"})
    assert "get_weather" not in speaker.prompt


def test_the_format_of_the_text(chat):
    client, speaker = chat
    speaker.say("\n hello")
    wanted = {"type": "json_schema", "schema": {"const": {"n": 5}}}
    found = post(client, HELLO, output_config={"format": wanted})
    assert json.loads(found["content"][0]["text"]) == {"n": 5}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "no call"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}]}, "id and name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "clock"),
        ({"temprature": 1}, "did you mean temperature"),
    ],
)
def test_wrong_requests_name_the_field(chat, change, words):
    client, _ = chat
    found = post(client, HELLO, status=400, **change)
    assert set(found) == {"type", "error"}
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert words in found["error"]["message"]


def test_errors_have_anthropics_form(chat):
    client, speaker = chat
    found = post(client, HELLO, status=404, model="claude")
    assert found["error"]["type"] == "not_found_error"
    speaker.say("\n hello")
    speaker.broken.add("step")
    try:
        events = events_of(client.post(URL, json={**HELLO, "stream": True}))
    finally:
        speaker.broken.clear()
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["type"] == "api_error"
