"""What users of the package `openai` do. Arguments: address of the server, key."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "about a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]
HELLO = [{"role": "user", "content": "hello"}]
ASK = [{"role": "user", "content": "weather"}]


class Number(BaseModel):
    n: Literal[7]


def texts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO)
    assert whole.choices[0].message.content == "the quick fox 🦊"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "the quick fox 🦊"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    several = client.chat.completions.create(model="tiny", messages=HELLO, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(several.choices[0].logprobs.content[0].top_logprobs) == 2
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).choices[0].text is not None
    assert "tiny" in [model.id for model in client.models.list()]


def tools(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in message.tool_calls]
    second = client.chat.completions.create(model="tiny", messages=[*ASK, message, *results], tools=TOOLS)
    assert second.choices[0].message.content == "it is 22"
    with client.chat.completions.stream(model="tiny", messages=ASK, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    calls = final.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "北京"}, {"city": "x"}]
    named = {"type": "function", "function": {"name": "get_time"}}
    forced = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, max_tokens=200
    )
    assert forced.choices[0].finish_reason in ("tool_calls", "length")


def formats(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Number)
    assert isinstance(parsed.choices[0].message.parsed, Number)
    answer = client.responses.parse(model="tiny", input="hello", text_format=Number)
    assert isinstance(answer.output_parsed, Number)


def responses(client: openai.OpenAI) -> None:
    assert client.responses.create(model="tiny", input="hello").output_text == "the quick fox 🦊"
    flat = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
    first = client.responses.create(model="tiny", input=ASK, tools=flat)
    calls = [item for item in first.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "22"} for call in calls]
    second = client.responses.create(model="tiny", input=[*ASK, *first.output, *results], tools=flat)
    assert second.output_text == "it is 22"
    with client.responses.stream(model="tiny", input="hello") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "the quick fox 🦊"


def refused(kind: type[openai.APIStatusError], client: openai.OpenAI, **request: object) -> None:
    try:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **request})
    except kind as error:
        if error.body["message"]:
            return
    raise AssertionError(f"{request}: no {kind.__name__} with a message")


def errors(client: openai.OpenAI) -> None:
    refused(openai.NotFoundError, client, model="gpt")
    refused(openai.BadRequestError, client, temperature=-1)
    refused(openai.BadRequestError, client, messages=[])
    refused(openai.BadRequestError, client, extra_body={"temprature": 1})
    refused(openai.AuthenticationError, client.with_options(api_key="wrong-key-0000000"))


async def together(address: str, key: str) -> None:
    client = openai.AsyncOpenAI(base_url=address, api_key=key, max_retries=0)
    answers = await asyncio.gather(
        *(client.chat.completions.create(model="tiny", messages=HELLO, seed=seed) for seed in range(16))
    )
    assert {answer.choices[0].message.content for answer in answers} == {"the quick fox 🦊"}
    await client.close()


def main() -> None:
    address, key = f"{sys.argv[1]}/v1", sys.argv[2]
    client = openai.OpenAI(base_url=address, api_key=key, max_retries=0, timeout=60)
    for step in (texts, tools, formats, responses, errors):
        step(client)
    asyncio.run(together(address, key))


main()
