"""Answers of the models: text and tool calls, from a whole answer or while it is generated.

A call is read by `ast` and `json` alone; nothing that a model writes is ever run. The form of calls is that of
ChatGLM3-6B: a message whose first line is the name of a tool, then `tool_call(name=value, ...)` in a code fence.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union

from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json

# The models write this mark in place of the end of their training data.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
_FENCE = "```"
_FENCED = re.compile(r"```\w*[^\S\n]*\n(.*)```", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


class ToolCallError(ValueError):
    """An answer of the model is not a tool call with plain values."""


@dataclass(frozen=True)
class Text:
    """The next piece of the text of an answer.

    `reason` says why the piece is text although it looks like a tool call; None for any other text.
    """

    text: str
    reason: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A whole call. `arguments` is the JSON object of its parameters."""

    name: str
    arguments: str


Part = Union[Text, ToolCall]


class AnswerParser:
    """Splits an answer that arrives in pieces of any size into text and tool calls.

    White space around a message is removed and the training date filled in, as in the answer that
    `process_response` of the tokenizers returns. Text is given out at once, except what may still become white space
    at the end, a mark, or the name of a tool. A call is given out whole: only its last character shows that it can be
    read, and what cannot be read comes out as text with the reason.

    Args:
        tools: names of the tools that the model may call; without any, the answer is text.
        separator: text between two messages of one answer; "": an answer is one message.
    """

    def __init__(self, tools: Iterable[str] = (), separator: str = "") -> None:
        self._tools = frozenset(tools)
        self._separator = separator
        self._arrived = ""  # the end of what arrived that may be the beginning of a separator
        self._has_text = False  # whether any message has given text
        self._begin_message()

    def _begin_message(self) -> None:
        self._held = ""  # of this message, not given out
        self._is_call: bool | None = None  # None: not known yet
        self._started = False  # whether text of this message was given out

    def push(self, text: str) -> list[Part]:
        """Takes the next piece of the answer; returns the parts that are final now, often none."""
        *messages, rest = (self._arrived + text).split(self._separator) if self._separator else [text]
        parts: list[Part] = []
        for message in messages:
            parts += self._advance(message, ended=True)
            self._begin_message()
        kept = len(rest) - _overlap(rest, self._separator)
        self._arrived = rest[kept:]
        return parts + self._advance(rest[:kept], ended=False)

    def close(self) -> list[Part]:
        """Ends the answer and returns its last parts. The next `push` begins a new answer."""
        parts = self._advance(self._arrived, ended=True)
        self._arrived, self._has_text = "", False
        self._begin_message()
        return parts

    def _advance(self, text: str, ended: bool) -> list[Part]:
        self._held += text
        if self._is_call is None:
            self._is_call = self._looks_like_call(ended)
        if self._is_call is False:
            return self._text_part(ended)
        return self._call_part() if ended else []

    def _looks_like_call(self, ended: bool) -> bool | None:
        """Whether the message is a call of a tool, or of one that does not exist; None: too short to know."""
        if not self._tools:
            return False
        first_line, line_break, body = self._held.partition("\n")
        name = first_line.strip()
        may_be_name = _NAME.fullmatch(name) is not None or any(tool.startswith(name) for tool in self._tools)
        if not line_break:
            return False if ended or not may_be_name else None
        if name in self._tools:
            return True
        opening = body.lstrip()[: len(_FENCE)]
        if not name or not may_be_name or not _FENCE.startswith(opening):
            return False
        return True if opening == _FENCE else False if ended else None

    def _text_part(self, ended: bool) -> list[Part]:
        text = replace_training_date(self._held)
        if not self._started:
            text = text.lstrip()
        ready = (text if ended else text[: len(text) - _overlap(text, _TRAINING_DATE[0])]).rstrip()
        self._held = text[len(ready) :]
        return [self._text(ready)] if ready else []

    def _call_part(self) -> list[Part]:
        first_line, _, body = self._held.partition("\n")
        name = first_line.strip()
        try:
            if name not in self._tools:
                raise ToolCallError(f"the model calls {name!r}, which is none of its tools: {', '.join(self._tools)}")
            return [ToolCall(name, arguments_json(parse_call(body)))]
        except ToolCallError as error:
            return [self._text(self._held.strip(), str(error))]

    def _text(self, text: str, reason: str | None = None) -> Text:
        if self._has_text and not self._started:  # of another message
            text = "\n" + text
        self._has_text = self._started = True
        return Text(text, reason)


def is_tool_name(text: str) -> bool:
    """Whether the first line of a message can be the name of a tool: a word without spaces, as `get_weather`."""
    return _NAME.fullmatch(text) is not None


def parse_call(body: str) -> dict[str, Any]:
    """Parameters of a call: the message without its first line, with or without a code fence.

    Raises:
        ToolCallError: neither `tool_call(name=value, ...)` with plain values nor a JSON object.
    """
    code = body.strip()
    fenced = _FENCED.fullmatch(code)
    if fenced is not None:
        code = fenced[1].strip()
    if not code.startswith("{"):
        return parse_tool_call(code)
    try:
        values = parse_json(code, "the call")
    except FileError as error:
        raise ToolCallError(str(error)) from None
    return dict(values)


def parse_tool_call(code: str) -> dict[str, Any]:
    """Arguments of `tool_call(city='Beijing', days=3)` as a dict.

    Values may be strings, numbers, True, False, None, and lists, tuples, sets and dicts of them.

    Raises:
        ToolCallError: another syntax, another function, positional or repeated arguments, computed values.
    """
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call":
            names = [keyword.arg for keyword in call.keywords]
            if not call.args and None not in names and len(set(names)) == len(names):
                return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    # Deep nesting exhausts the parser's stack: RecursionError or MemoryError by Python version.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ToolCallError(f"not a call tool_call(name=value, ...) with plain values: {code[:200]!r}")


def arguments_json(parameters: dict[str, Any]) -> str:
    """Parameters of a call as a JSON object; tuples and sets become lists.

    Raises:
        ToolCallError: JSON has no such value: infinity, bytes, half of a surrogate pair.
    """
    try:
        text = json.dumps(parameters, ensure_ascii=False, allow_nan=False, default=_listed)
        text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ToolCallError(f"the parameters of the call cannot be written as JSON: {error}") from None
    return text


def _listed(value: Any) -> list[Any]:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    raise TypeError(f"JSON has no {type(value).__name__}")


def replace_training_date(text: str) -> str:
    """Fills in the date that the models leave open."""
    return text.replace(*_TRAINING_DATE)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that is a beginning of a mark, less than the whole mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
