"""What users of the package `litellm` do. Arguments: address of the server, key."""

from __future__ import annotations

import sys

import litellm

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    for name in ("get_weather", "get_time")
]
HELLO = [{"role": "user", "content": "hello"}]
ASK = [{"role": "user", "content": "weather"}]


def main() -> None:
    litellm.suppress_debug_info = True
    openai_like = {"model": "openai/tiny", "api_base": f"{sys.argv[1]}/v1", "api_key": sys.argv[2], "max_retries": 0}
    anthropic_like = {"model": "anthropic/tiny", "api_base": sys.argv[1], "api_key": sys.argv[2], "max_tokens": 100}
    for where in (openai_like, anthropic_like):
        assert litellm.completion(messages=HELLO, **where).choices[0].message.content == "the quick fox 🦊"
        chunks = list(litellm.completion(messages=HELLO, stream=True, **where))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "the quick fox 🦊"
        message = litellm.completion(messages=ASK, tools=TOOLS, **where).choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in message.tool_calls]
        answer = litellm.completion(messages=[*ASK, message, *results], tools=TOOLS, **where)
        assert answer.choices[0].message.content == "it is 22"
    try:
        litellm.completion(messages=HELLO, **{**openai_like, "model": "openai/gpt"})
    except litellm.NotFoundError:
        return
    raise AssertionError("an unknown model is accepted")


main()
