"""Conversations in OpenAI's form as messages of the prompt templates of the model families."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm_ms.data.records import TOOLS_INTRODUCTION, format_tool_call, tool_call_problem
from glm_ms.serve.errors import APIError, wrong_field
from glm_ms.serve.tools import Tool, python_names
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json
from glm_ms.tokenizer import SentencePieceTokenizer
from glm_ms.tokenizer.base import PLAIN

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Without effect: the template has no place for the name of a participant; `index` comes from streams.
_MESSAGE_KEYS = {
    "system": ("name",),
    "developer": ("name",),
    "user": ("name",),
    "assistant": ("name", "tool_calls"),
    "tool": ("name", "tool_call_id"),
}
_CALL_KEYS = ("id", "type", "function", "index")


@dataclass(frozen=True)
class Message:
    """A message of OpenAI's form, checked."""

    role: str  # system, user, assistant or tool
    content: str
    calls: tuple[tuple[str, str, Mapping[str, Any]], ...] = ()  # id, name, arguments
    call_id: str = ""  # of a message of a tool
    place: str = "messages"  # for errors


def read_messages(items: Any, place: str = "messages") -> list[Message]:
    """Checks messages in OpenAI's form.

    Raises:
        APIError: 400; it names the field.
    """
    if not isinstance(items, list) or not items:
        raise wrong_field(place, "must be a list with a message")
    messages = [_message(item, f"{place}[{number}]") for number, item in enumerate(items)]
    return check_results(messages)


def prompt_ids(tokenizer: SentencePieceTokenizer, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Ids of a conversation in the template of the model, up to where the answer begins.

    Raises:
        APIError: 400; the template has no place for something.
    """
    place = messages[-1].place
    if tokenizer.template == PLAIN:
        raise wrong_field(place, "this model has no chat template; send a text to /v1/completions")
    try:
        if not tokenizer.roles:
            return _question_and_answer(tokenizer, messages, tools)
        *history, last = _role_messages(messages, tools)
        return tokenizer.build_chat_input(last["content"], history, last["role"])["input_ids"]
    except (ValueError, AssertionError) as error:
        raise wrong_field(place, str(error)) from None


def _role_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages of ChatGLM3. The tools come first, as in the records that the model learns from."""
    found: list[dict[str, Any]] = []
    if tools:
        shown = [tool.for_prompt() for tool in tools]
        found.append({"role": "system", "content": TOOLS_INTRODUCTION.rstrip("\n"), "tools": shown})
    for message in messages:
        if message.role == "tool":
            found.append({"role": "observation", "content": message.content})
        elif message.content or not message.calls:
            found.append({"role": message.role, "content": message.content})
        for _, name, arguments in message.calls:
            code = f"```python\n{format_tool_call(_renamed(arguments, name, tools))}\n```"
            found.append({"role": "assistant", "metadata": name, "content": code})
    return found


def _renamed(arguments: Mapping[str, Any], name: str, tools: Sequence[Tool]) -> dict[str, Any]:
    tool = next((tool for tool in tools if tool.name == name), None)
    names = python_names([*(() if tool is None else tool.given_names()), *arguments])
    return {names[key]: value for key, value in arguments.items()}


def _question_and_answer(
    tokenizer: SentencePieceTokenizer, messages: Sequence[Message], tools: Sequence[Tool]
) -> list[int]:
    """Ids of rounds of ChatGLM2. It has no system messages: their text comes before the last question.

    Source: openai_api.py of ChatGLM2-6B.
    """
    if tools or any(message.calls or message.role == "tool" for message in messages):
        raise ValueError("this model has no tools; remove them, or use ChatGLM3")
    rounds = [{"role": item.role, "content": item.content} for item in messages if item.role != "system"]
    system = "".join(item.content for item in messages if item.role == "system")
    if not rounds or rounds[-1]["role"] != "user":
        raise ValueError("the last message must be one of the user")
    return tokenizer.build_chat_input(system + rounds[-1]["content"], rounds[:-1])["input_ids"]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise wrong_field(place, f"must be an object with role and content, found {item!r:.60}")
    role = item.get("role")
    if role not in _ROLES:
        hint = "; calls of functions are tool_calls, and results have the role tool" if role == "function" else ""
        raise wrong_field(f"{place}.role", f"must be one of {', '.join(_ROLES)}, found {role!r:.60}{hint}")
    for key, value in item.items():
        if key not in ("role", "content", *_MESSAGE_KEYS[role]) and value not in (None, [], {}, ""):
            raise wrong_field(f"{place}.{key}", f"not supported in a message of the role {role}")
    calls = _calls(item.get("tool_calls"), f"{place}.tool_calls") if role == "assistant" else ()
    content = text_of(item.get("content"), f"{place}.content", optional=role == "assistant")
    call_id = item.get("tool_call_id") if role == "tool" else ""
    if not isinstance(call_id, str):
        raise wrong_field(f"{place}.tool_call_id", f"must be the id of a call, found {call_id!r:.60}")
    return Message("system" if role == "developer" else role, content, calls, call_id, place)


def text_of(value: Any, place: str, kinds: Collection[str] = ("text",), optional: bool = False) -> str:
    """The text of a content: a string, or a list of parts of these kinds with a text each.

    Raises:
        APIError: 400; another form or kind.
    """
    if isinstance(value, str) or (value is None and optional):
        return value or ""
    if not isinstance(value, list):
        raise wrong_field(place, f"must be a text or a list of parts, found {value!r:.60}")
    texts = []
    for number, part in enumerate(value):
        where, kind = f"{place}[{number}]", part.get("type") if isinstance(part, dict) else part
        if not isinstance(kind, str) or kind not in kinds:
            expected = " or ".join(kinds)
            raise wrong_field(f"{where}.type", f"must be {expected}, found {kind!r:.60}; this model reads text only")
        if not isinstance(part.get("text"), str):
            raise wrong_field(f"{where}.text", f"must be a text, found {part.get('text')!r:.60}")
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(items: Any, place: str) -> tuple[tuple[str, str, Mapping[str, Any]], ...]:
    if items is None:
        return ()
    if not isinstance(items, list):
        raise wrong_field(place, f"must be a list of calls, found {items!r:.60}")
    return tuple(_call(item, f"{place}[{number}]") for number, item in enumerate(items))


def _call(item: Any, place: str) -> tuple[str, str, Mapping[str, Any]]:
    function = item.get("function") if isinstance(item, dict) else None
    if not isinstance(function, dict) or item.get("type", "function") != "function":
        raise wrong_field(place, "must be an object of the type function with id and function")
    unknown = next((key for key in item if key not in _CALL_KEYS and item[key]), None)
    if unknown is not None or not isinstance(item.get("id"), str):
        raise wrong_field(f"{place}.{unknown or 'id'}", "is not known" if unknown else "must be a text")
    name, text = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise wrong_field(f"{place}.function.name", f"must be the name of a function, found {name!r:.60}")
    if not isinstance(text, str):
        raise wrong_field(f"{place}.function.arguments", f"must be a text with a JSON object, found {text!r:.60}")
    return item["id"], name, parse_arguments(text, f"{place}.function.arguments")


def parse_arguments(text: str, place: str) -> Mapping[str, Any]:
    """The object of the arguments of a call; empty text is an object without arguments."""
    try:
        values = parse_json(text, place) if text.strip() else {}
    except FileError as error:
        raise APIError(400, str(error), place) from None
    return checked_arguments(values, place)


def checked_arguments(values: Any, place: str) -> Mapping[str, Any]:
    """The arguments of a call, checked: an object that can be written as a call."""
    if not isinstance(values, dict):
        raise wrong_field(place, f"must be a JSON object, found {type(values).__name__}")
    problem = tool_call_problem({python_names(values)[name]: value for name, value in values.items()})
    if problem:
        raise wrong_field(place, problem)
    return values


def check_results(messages: list[Message]) -> list[Message]:
    """The messages themselves.

    Raises:
        APIError: 400; a result of a tool without a call in the last message of the assistant, or a call without result.
    """
    waiting: dict[str, str] = {}  # id -> name of calls without result
    place = ""  # of these
    for message in messages:
        if message.role == "tool":
            if waiting.pop(message.call_id, None) is None:
                text = f"{message.call_id!r:.60}: the message of the assistant before it has no call with this id"
                raise wrong_field(f"{message.place}.tool_call_id", text)
            continue
        _refuse_missing(waiting, place)
        waiting, place = {call_id: name for call_id, name, _ in message.calls}, message.place
        if len(waiting) < len(message.calls):
            raise wrong_field(f"{place}.tool_calls", "two calls have the same id")
    _refuse_missing(waiting, place)
    return messages


def _refuse_missing(waiting: Mapping[str, str], place: str) -> None:
    for call_id, name in waiting.items():
        raise wrong_field(place, f"the result of the call {call_id!r:.60} of {name} is missing after it")
