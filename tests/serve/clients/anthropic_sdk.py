"""What users of the package `anthropic` do. Arguments: address of the server, key."""

from __future__ import annotations

import sys

import anthropic

TOOLS = [
    {
        "name": name,
        "description": "about a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    for name in ("get_weather", "get_time")
]
HELLO = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
ASK = {**HELLO, "messages": [{"role": "user", "content": "weather"}], "tools": TOOLS}


def main() -> None:
    client = anthropic.Anthropic(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0, timeout=60)
    whole = client.messages.create(**HELLO, system="be short")
    assert whole.content[0].text == "the quick fox 🦊"
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**HELLO) as stream:
        assert "".join(stream.text_stream) == "the quick fox 🦊"
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens

    first = client.messages.create(**ASK)
    assert first.stop_reason == "tool_use"
    with client.messages.stream(**ASK) as stream:
        streamed = stream.get_final_message()
    same = [(block.name, block.input) for block in streamed.content]
    assert same == [("get_weather", {"city": "北京"}), ("get_time", {"city": "x"})]
    assert same == [(block.name, block.input) for block in first.content]
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "22"} for block in first.content]
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    assert client.messages.create(**{**ASK, "messages": messages}).content[0].text == "it is 22"
    count = client.messages.count_tokens(model="tiny", messages=HELLO["messages"], system="be short")
    assert count.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens

    refused(anthropic.NotFoundError, client, model="claude")
    refused(anthropic.BadRequestError, client, max_tokens=10**6)
    refused(anthropic.AuthenticationError, client.with_options(api_key="wrong-key-0000000"))


def refused(kind: type[anthropic.APIStatusError], client: anthropic.Anthropic, **request: object) -> None:
    try:
        client.messages.create(**{**HELLO, **request})
    except kind as error:
        if error.body["error"]["message"]:
            return
    raise AssertionError(f"{request}: no {kind.__name__} with a message")


main()
