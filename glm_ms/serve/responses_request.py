"""The request of /v1/responses, and its input as a conversation."""

# Without `from __future__ import annotations`: see options.py.
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from glm_ms.serve.chat_request import MAX_ALTERNATIVES
from glm_ms.serve.conversation import Message, check_results, parse_arguments, text_of
from glm_ms.serve.errors import wrong_field
from glm_ms.serve.options import Body, StreamOptions
from glm_ms.serve.tools import Tool, ToolChoice, checked_names, choice_of, read_choice, read_function

LOGPROBS = "message.output_text.logprobs"  # in `include`
_ROLES = ("system", "developer", "user", "assistant")
_PARTS = ("input_text", "output_text", "text")


class TextOptions(Body):
    """`text` of /v1/responses."""

    format: Optional[dict[str, Any]] = Field(None, description="text, json_object or json_schema.")


class ResponsesRequest(Body):
    """The fields of /v1/responses. The server keeps no conversations: a request has all of its own."""

    ignored = frozenset(
        {"user", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
    )

    model: Optional[str] = Field(None, description="The model, or one of its adapters.")
    input: Union[Annotated[str, Field(min_length=1)], Annotated[list[dict[str, Any]], Field(min_length=1)]] = Field(
        description="A text of the user, or messages, calls and their results."
    )
    instructions: Optional[str] = Field(None, description="Text of a system message before the input.")
    max_output_tokens: Optional[int] = Field(None, ge=1)
    temperature: Optional[float] = Field(None, ge=0, le=100)
    top_p: Optional[float] = Field(None, gt=0, le=1)
    tools: Optional[list[dict[str, Any]]] = None
    tool_choice: Union[str, dict[str, Any], None] = None
    parallel_tool_calls: Optional[bool] = None
    text: Optional[TextOptions] = None
    include: Optional[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]]] = None
    top_logprobs: Optional[int] = Field(None, ge=0, le=MAX_ALTERNATIVES)
    metadata: Optional[dict[str, str]] = None
    truncation: Optional[Literal["disabled"]] = None
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    previous_response_id: Optional[str] = None
    conversation: Union[str, dict[str, Any], None] = None
    background: Optional[bool] = None
    reasoning: Optional[dict[str, Any]] = None

    @model_validator(mode="after")
    def _possible(self) -> "ResponsesRequest":
        kept = "the server keeps no conversations; send all messages in input"
        for name, wrong, text in (
            ("previous_response_id", self.previous_response_id is not None, kept),
            ("conversation", self.conversation is not None, kept),
            ("background", bool(self.background), "not supported; remove it"),
            ("reasoning", any(value is not None for value in (self.reasoning or {}).values()), "not supported"),
        ):
            if wrong:
                raise PydanticCustomError("not_possible", "{text}", {"field": name, "text": text})
        return self

    @property
    def alternatives(self) -> Optional[int]:
        """Number of alternatives to each token; None: no log-probabilities."""
        wanted = LOGPROBS in (self.include or ()) or self.top_logprobs is not None
        return (self.top_logprobs or 0) if wanted else None

    def messages(self) -> list[Message]:
        """The conversation.

        Raises:
            APIError: 400; it names the field.
        """
        found = [] if self.instructions is None else [Message("system", self.instructions, place="instructions")]
        if isinstance(self.input, str):
            return [*found, Message("user", self.input, place="input")]
        for number, item in enumerate(self.input):
            _add(found, item, f"input[{number}]")
        return check_results(found)

    def choice(self) -> ToolChoice:
        """The tools and the choice among them; errors as of `messages`."""
        tools = checked_names([_tool(item, f"tools[{number}]") for number, item in enumerate(self.tools or ())])
        value, parallel = self.tool_choice, self.parallel_tool_calls
        if isinstance(value, Mapping) and value.get("type") == "function" and isinstance(value.get("name"), str):
            return choice_of(value["name"], parallel, tools, "tool_choice")
        return read_choice(value, parallel, tools)


def _tool(item: Mapping[str, Any], place: str) -> Tool:
    if item.get("type") != "function":
        raise wrong_field(f"{place}.type", f"must be function, found {item.get('type')!r:.60}")
    return read_function(item, place)


def _add(messages: list[Message], item: Mapping[str, Any], place: str) -> None:
    """Adds an item of the input. Calls belong to the message of the assistant before them, if there is one."""
    kind = item.get("type", "message")
    if kind == "function_call":
        call_id, name = item.get("call_id"), item.get("name")
        if not isinstance(call_id, str) or not isinstance(name, str) or not isinstance(item.get("arguments"), str):
            raise wrong_field(place, "a function_call has the texts call_id, name and arguments")
        call = (call_id, name, parse_arguments(item["arguments"], f"{place}.arguments"))
        before = messages.pop() if messages and messages[-1].role == "assistant" else Message("assistant", "")
        messages.append(Message("assistant", before.content, (*before.calls, call), place=place))
    elif kind == "function_call_output":
        if not isinstance(item.get("call_id"), str):
            raise wrong_field(f"{place}.call_id", "must be the id of a call")
        text = text_of(item.get("output"), f"{place}.output", _PARTS)
        messages.append(Message("tool", text, call_id=item["call_id"], place=place))
    elif kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise wrong_field(f"{place}.role", f"must be one of {', '.join(_ROLES)}, found {role!r:.60}")
        text = text_of(item.get("content"), f"{place}.content", _PARTS)
        messages.append(Message("system" if role == "developer" else role, text, place=place))
    else:
        expected = "message, function_call or function_call_output"
        raise wrong_field(f"{place}.type", f"must be {expected}, found {kind!r:.60}")
