"""/v1/responses: the object, the events of a stream, inputs, errors."""

from __future__ import annotations

import json

import pytest
from serve.chat_helpers import CLOCK, WEATHER, called, events_of

URL = "/v1/responses"
HELLO = {"input": "hello there"}
TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]


def post(client, body, status=200, **more):
    response = client.post(URL, json={**body, **more})
    assert response.status_code == status, response.text
    return response.json()


def test_a_text(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n the quick fox 🦊")
    found = post(client, HELLO, instructions="be short", temperature=0)
    assert (found["object"], found["status"], found["error"]) == ("response", "completed", None)
    (item,) = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    (part,) = item["content"]
    assert part == {"type": "output_text", "text": "the quick fox 🦊", "annotations": [], "logprobs": []}
    history = [{"role": "system", "content": "be short"}]
    prompt = tokenizer.build_chat_input("hello there", history)["input_ids"]
    assert speaker.prompts[-1] == prompt
    usage = found["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt), len(speaker.answer))
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["total_tokens"] == sum((usage["input_tokens"], usage["output_tokens"]))


def test_the_limit_of_tokens(chat):
    client, speaker = chat
    speaker.say("\n the quick brown fox jumps")
    found = post(client, HELLO, max_output_tokens=5)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"


def test_events_build_the_response(chat):
    client, speaker = chat
    speaker.say("\n the fox", called("get_weather", "city='北京'"), end="<|observation|>")
    events = events_of(client.post(URL, json={**HELLO, "tools": TOOLS, "stream": True, "temperature": 0}))
    assert all(name == value["type"] for name, value in events)
    assert [value["sequence_number"] for _, value in events] == list(range(len(events)))
    names = [name.removeprefix("response.") for name, _ in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    end = names.index("output_text.done")
    assert set(names[4:end]) == {"output_text.delta"}
    assert names[end:] == [
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    values = [value for _, value in events]
    assert "".join(value["delta"] for value in values[4:end]) == values[end]["text"] == "the fox"
    assert values[0]["response"]["output"] == []
    final = values[-1]["response"]
    assert [value["item"] for value in values if value["type"] == "response.output_item.done"] == final["output"]
    message, call = final["output"]
    assert message["content"][0]["text"] == "the fox"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "北京"},
    )
    whole = post(client, HELLO, tools=TOOLS, temperature=0)["output"]
    same = ("type", "status", "role", "content", "name", "arguments")
    for one, other in zip(whole, final["output"]):
        assert [one.get(key) for key in same] == [other.get(key) for key in same]


def test_a_round_with_results(chat, tokenizer):
    client, speaker = chat
    speaker.say("\n hello", called("get_weather", "city='北京'"), called("clock", ""), end="<|observation|>")
    first = post(client, HELLO, tools=TOOLS, temperature=0)["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": item["name"]}
        for item in first
        if item["type"] == "function_call"
    ]
    before = speaker.prompts[-1]
    speaker.say("\n fox")
    question = {"role": "user", "content": [{"type": "input_text", "text": "hello there"}]}
    post(client, {"input": [question, *first, *results]}, tools=TOOLS)
    said = "<|assistant|>".join(
        (" \n hello", " get_weather\n ```python\ntool_call(city='北京')\n```", " clock\n ```python\ntool_call()\n```")
    )
    rest = "<|observation|> \n get_weather<|observation|> \n clock<|assistant|>"
    assert tokenizer.decode(speaker.prompts[-1]) == tokenizer.decode(before) + said + rest


def test_the_format_of_the_text(chat):
    client, speaker = chat
    speaker.say("\n hello")
    wanted = {"type": "json_schema", "name": "n", "schema": {"const": {"n": 5}}, "strict": True}
    found = post(client, HELLO, text={"format": wanted})
    assert json.loads(found["output"][0]["content"][0]["text"]) == {"n": 5}
    assert found["text"]["format"] == wanted


def test_log_probabilities(chat):
    client, speaker = chat
    speaker.say("\n hello")
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "temperature": 0}
    content = post(client, HELLO, **options)["output"][0]["content"][0]["logprobs"]
    assert "".join(one["token"] for one in content).strip() == "hello"
    assert all(len(one["top_logprobs"]) == 1 for one in content)


def test_a_named_tool(chat):
    client, speaker = chat
    speaker.say("\n no")
    choice = {"type": "function", "name": "clock"}
    found = post(client, HELLO, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert [item["name"] for item in found["output"]] == ["clock"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"input": None}, "input", ""),
        ({"input": ""}, "input", ""),
        ({"input": [{"role": "usr", "content": "a"}]}, "input[0].role", ""),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "function_call_output"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].tool_call_id", ""),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send all messages"),
        ({"background": True}, "background", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": TOOLS}, "tool_choice", "clock"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.json_schema", "schema"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "at most 4096"),
    ],
)
def test_wrong_requests_name_the_field(chat, change, param, words):
    client, _ = chat
    error = post(client, HELLO, status=400, **change)["error"]
    assert error["param"] == param, error
    assert words in error["message"]


def test_an_error_in_a_stream_is_an_event(chat):
    client, speaker = chat
    speaker.say("\n hello")
    speaker.broken.add("step")
    try:
        events = events_of(client.post(URL, json={**HELLO, "stream": True}))
    finally:
        speaker.broken.clear()
    name, value = events[-1]
    assert name == value["type"] == "error"
    assert "failed" in value["message"]
