"""What users of the package `langchain-openai` do. Arguments: address of the server, key."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Number(BaseModel):
    """A number."""

    n: Literal[7]


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    return "22"


@tool
def get_time(city: str) -> str:
    """Time in a city."""
    return "22"


def check_tools(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather, get_time])
    question = HumanMessage("weather")
    answer = bound.invoke([question])
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("get_weather", {"city": "北京"}),
        ("get_time", {"city": "x"}),
    ]
    results = [ToolMessage("22", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert bound.invoke([question, answer, *results]).content == "it is 22"
    whole = None
    for chunk in bound.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["get_weather", "get_time"]


def main() -> None:
    model = ChatOpenAI(model="tiny", base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0, timeout=60)
    hello = [SystemMessage("be short"), HumanMessage("hello")]
    answer = model.invoke(hello)
    assert answer.content == "the quick fox 🦊"
    assert answer.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(hello)) == "the quick fox 🦊"
    batch = asyncio.run(model.abatch([hello] * 4))
    assert [one.content for one in batch] == ["the quick fox 🦊"] * 4
    check_tools(model)
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Number, method=method).invoke("hello")
        assert isinstance(found, Number), method
    try:
        ChatOpenAI(model="gpt", base_url=f"{sys.argv[1]}/v1", api_key=sys.argv[2], max_retries=0).invoke("hello")
    except openai.NotFoundError:
        return
    raise AssertionError("an unknown model is accepted")


main()
