"""The request of /v1/messages, and its messages as a conversation."""

# Without `from __future__ import annotations`: see options.py.
from collections.abc import Mapping
from typing import Annotated, Any, Optional, Union

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from glm_ms.serve.chat_request import ChatSampling
from glm_ms.serve.conversation import Message, check_results, checked_arguments, text_of
from glm_ms.serve.errors import wrong_field
from glm_ms.serve.options import MAX_STOPS, Body, Text
from glm_ms.serve.tools import Tool, ToolChoice, checked_names, choice_of, read_function


class OutputConfig(Body):
    """`output_config` of Anthropic."""

    format: Optional[dict[str, Any]] = None


class CountRequest(Body):
    """The fields of /v1/messages/count_tokens."""

    ignored = frozenset({"metadata", "service_tier", "cache_control"})

    model: Optional[str] = Field(None, description="The model, or one of its adapters.")
    messages: list[dict[str, Any]] = Field(min_length=1, description="Messages of user and assistant.")
    system: Union[str, list[dict[str, Any]], None] = None
    tools: Optional[list[dict[str, Any]]] = None
    tool_choice: Optional[dict[str, Any]] = None
    thinking: Optional[dict[str, Any]] = None

    @model_validator(mode="after")
    def _no_thinking(self) -> "CountRequest":
        if self.thinking is not None and self.thinking.get("type") != "disabled":
            raise PydanticCustomError("not_possible", "not supported; remove it", {"field": "thinking"})
        return self

    def conversation(self) -> list[Message]:
        """The conversation.

        Raises:
            APIError: 400; it names the field.
        """
        system = text_of(self.system, "system", optional=True)
        found = [Message("system", system, place="system")] if system else []
        for number, item in enumerate(self.messages):
            found += _messages(item, f"messages[{number}]")
        return check_results(found)

    def choice(self) -> ToolChoice:
        """The tools and the choice among them; errors as of `conversation`."""
        tools = checked_names([_tool(item, f"tools[{number}]") for number, item in enumerate(self.tools or ())])
        given = self.tool_choice or {"type": "auto"}
        kind, parallel = given.get("type"), not given.get("disable_parallel_tool_use")
        if kind == "tool" and isinstance(given.get("name"), str):
            return choice_of(given["name"], parallel, tools, "tool_choice.name")
        modes = {"auto": "auto" if tools else "none", "any": "required", "none": "none"}
        if not isinstance(kind, str) or kind not in modes or (kind == "any" and not tools):
            expected = "auto, any (with tools), tool (with a name) or none"
            raise wrong_field("tool_choice.type", f"must be {expected}, found {kind!r:.60}")
        return ToolChoice(modes[kind], tuple(tools), parallel=parallel)


class MessagesRequest(CountRequest):
    """The fields of /v1/messages."""

    max_tokens: int = Field(ge=1)
    temperature: Optional[float] = Field(None, ge=0, le=100)
    top_p: Optional[float] = Field(None, gt=0, le=1)
    top_k: Optional[int] = Field(None, ge=-1)
    stop_sequences: Optional[Annotated[list[Text], Field(max_length=MAX_STOPS)]] = None
    output_config: Optional[OutputConfig] = None
    stream: Optional[bool] = None

    @property
    def sampling(self) -> ChatSampling:
        """How tokens are chosen."""
        stop = self.stop_sequences or None
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "stop": stop}
        return ChatSampling.model_validate(given)


def _tool(item: Mapping[str, Any], place: str) -> Tool:
    if item.get("type", "custom") != "custom":
        raise wrong_field(f"{place}.type", f"must be custom, found {item.get('type')!r:.60}")
    return read_function(item, place, "input_schema")


def _messages(item: Mapping[str, Any], place: str) -> list[Message]:
    """A message of Anthropic's form. Results of tools come before the text of the same message."""
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant"):
        raise wrong_field(f"{place}.role", f"must be user or assistant, found {role!r:.60}")
    if isinstance(content, str):
        return [Message(role, content, place=place)]
    if not isinstance(content, list) or not content:
        raise wrong_field(f"{place}.content", f"must be a text or a list of blocks, found {content!r:.60}")
    special = {"user": "tool_result", "assistant": "tool_use"}[role]
    texts, calls, results = [], [], []
    for number, block in enumerate(content):
        where, kind = f"{place}.content[{number}]", block.get("type") if isinstance(block, dict) else block
        if kind != special:
            texts.append(text_of([block], where, ("text",)))
        elif kind == "tool_use":
            calls.append(_call(block, where))
        else:
            results.append(_result(block, where))
    if not texts and results:
        return results
    return [*results, Message(role, "\n".join(texts), tuple(calls), place=place)]


def _call(block: Mapping[str, Any], place: str) -> tuple[str, str, Mapping[str, Any]]:
    if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
        raise wrong_field(place, "a tool_use has the texts id and name")
    return block["id"], block["name"], checked_arguments(block.get("input", {}), f"{place}.input")


def _result(block: Mapping[str, Any], place: str) -> Message:
    if not isinstance(block.get("tool_use_id"), str):
        raise wrong_field(f"{place}.tool_use_id", "must be the id of a tool_use")
    text = text_of(block.get("content"), f"{place}.content", optional=True)
    return Message("tool", text, call_id=block["tool_use_id"], place=place)
