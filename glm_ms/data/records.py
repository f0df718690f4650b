"""Readers of records: JSON values to checked messages.

Conversations have two forms, that of `finetune_hf.py` of ChatGLM3 (`parse_conversation`):

    {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

and the earlier one of `finetune_chatmodel_demo` (`parse_tool_conversation`), in which a conversation may have tools,
messages with the role `tool` (a call and its result), and messages that take no part in the loss:

    {"tools": [...], "conversations": [{"role": "user", "content": "..."},
      {"role": "assistant", "content": "...", "loss": false},
      {"role": "tool", "name": "...", "parameters": {...}, "observation": ...}, ...]}

Every reader takes a JSON value, its place (`file:line`, the beginning of errors) and `Columns`. What would change the
meaning of a record is read or refused; `other_columns` and `other_keys` name what else it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_ms.data.encoder import Columns, Message, Messages
from glm_ms.spelling import argument
from glm_ms.storage.errors import DataError
from glm_ms.storage.suggest import did_you_mean, misspelled
from glm_ms.tokenizer.answers import ToolCallError, parse_tool_call
from glm_ms.tokenizer.base import OF_CHATGLM3
from glm_ms.tokenizer.chatglm3 import ROLES, checked_tools, tools_json

_CONVERSATIONS, _TOOLS, _INSTRUCTION = "conversations", "tools", "instruction"
_MESSAGE_KEYS = ("role", "content", "loss", "name", "parameters", "observation", "metadata")
_TOOL_KEYS = ("name", "parameters", "observation")
_WITHOUT_LOSS = ("system", "user")
# Columns that change what an answer depends on -> how a record of prompt and answer uses them.
_CONTEXT = {
    "history": "name it as the third of origin_columns, or history_column: history",
    "system": "set system_column: system",
    "tools": "set tools_column: tools",
    _INSTRUCTION: "set origin_columns: [instruction, ...], and input_column for what follows the instruction",
    "input": "set input_column: input, which follows the prompt on a new line",
}
# Keys of a prompt to answer: one of the first, and any of the others, in the order of `Columns`.
PROMPT_KEYS = ("prompt", "content", "query", "text", _INSTRUCTION)
_PROMPT_CONTEXT = ("history", "input", "system", "tools")
PROMPT_FORMS = f"expected a text that is not empty, or an object with one as {', '.join(PROMPT_KEYS)}"
# These words are part of what the released model was trained on.
TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:\n"


def read_prompt_and_answer(value: Any, place: str, columns: Columns) -> Messages | None:
    """Reader of ADGenDataLoader: messages of user and assistant in turn, the answers with loss.

    Tools and a system message, if there are any, come first. A record may lack the columns of them, of the history and
    of the input.

    Returns:
        The messages; None if prompt or answer is empty or null, which the reference skips too.

    Raises:
        DataError: the value is not an object, the column of prompt or answer is missing, a column has another type, or
            a column of `_CONTEXT` is not empty and not named.
    """
    if not isinstance(value, dict):
        example = ", ".join(f"{json.dumps(name)}: ..." for name in columns[:2])
        raise DataError(f"{place}: a record must be a JSON object such as {{{example}}}, found {type(value).__name__}")
    for name in columns:
        if name is None or name in value:
            continue
        others = [key for key in value if key not in columns]
        if name in columns[:2] or misspelled(name, others):
            raise DataError(
                f"{place}: no column {name!r}, the record has {_names(value)}{did_you_mean(name, others).rstrip('?')}; "
                f"name the columns of the file in {argument('origin_columns')}"
            )
    for name, remedy in _CONTEXT.items():
        if name not in columns and _is_filled(value.get(name)):
            raise DataError(f"{place}: column {name!r} is not used; {remedy} (below data_loader), or remove it")
    messages = _up_to_prompt(value, place, columns)
    answer = _column_text(value, columns.response, place)
    if not messages[-1].content or not answer:
        return None
    return (*messages, Message("assistant", answer, loss=True))


def parse_prompt(value: Mapping[str, Any], place: str, left_out: set[str]) -> Messages:
    """The messages of a prompt to answer, the last of which is the question.

    Args:
        value: an object with a text as one of PROMPT_KEYS, and optionally `input`, `history`, `system` and `tools`; or
            `conversations`, optionally with `tools`, in the form of `parse_tool_conversation`.
        left_out: receives the keys that have no effect.

    Raises:
        DataError: another form, no text, or a conversation that does not end with a message to answer.
    """
    if _CONVERSATIONS in value:
        record = _conversation(value, place)
        messages = _tools_message(record.get(_TOOLS), f"{place}: {_TOOLS!r}")
        messages += _messages(_conversation_items(record, place))
        left_out.update(other_keys(value))
    else:
        key = next((key for key in PROMPT_KEYS if key in value), None)
        if key is None:
            raise DataError(f"{place}: {PROMPT_FORMS}, found {_names(value)}")
        _refuse_near_misses(value, _PROMPT_CONTEXT, place)
        if key != _INSTRUCTION and _is_filled(value.get(_INSTRUCTION)):
            raise DataError(f"{place}: {_INSTRUCTION!r} is not used beside {key!r}; write both into one text")
        columns = Columns(key, key, *_PROMPT_CONTEXT)
        messages = _up_to_prompt(value, place, columns)
        left_out.update(other_columns(value, columns))
    if messages[-1].role not in ("user", "observation"):
        raise DataError(f"{place}: ends with a message of the {messages[-1].role}; end it with the question to answer")
    if not messages[-1].content.strip():
        raise DataError(f"{place}: {PROMPT_FORMS}, found an empty text")
    return tuple(messages)


def other_columns(value: Mapping[str, Any], columns: Columns) -> Iterator[str]:
    """The columns of a record of prompt and answer, and the keys of messages in it, that are not read and not empty."""
    yield from (f"column {name!r}" for name, item in value.items() if name not in columns and _is_filled(item))
    yield from _other_message_keys(_value(value, columns.history) or ())


def other_keys(value: Mapping[str, Any], columns: Columns | None = None) -> Iterator[str]:
    """The keys of a conversation and of its messages that are not read and not empty."""
    known = (_CONVERSATIONS, _TOOLS)
    yield from (f"key {name!r}" for name, item in value.items() if name not in known and _is_filled(item))
    yield from _other_message_keys(value[_CONVERSATIONS])


def _other_message_keys(items: Iterable[Any]) -> Iterator[str]:
    for message in items:
        if isinstance(message, dict):
            others = (name for name, item in message.items() if name not in _MESSAGE_KEYS and _is_filled(item))
            yield from (f"key {name!r} of messages" for name in others)


def _is_filled(value: Any) -> bool:
    if isinstance(value, str) and value.strip() == "[]":  # JSON text of a list
        return False
    return value is not None and value != "" and value != [] and value != {}


def _value(value: Mapping[str, Any], name: str | None) -> Any:
    return None if name is None else value.get(name)


def _column_text(value: Mapping[str, Any], name: str | None, place: str) -> str:
    text = _value(value, name)
    return "" if text is None else checked_text(text, f"{place}: column {name!r}")


def _up_to_prompt(value: Mapping[str, Any], place: str, columns: Columns) -> list[Message]:
    """The messages of a record before its answer; the last is the prompt, which may be empty."""
    prompt, more, system = (
        _column_text(value, name, place) for name in (columns.prompt, columns.input, columns.system)
    )
    tools = _value(value, columns.tools)
    return [
        *_tools_message(tools, f"{place}: column {columns.tools!r}", or_none=True),
        *([Message("system", system)] if system else ()),
        *_history(_value(value, columns.history), f"{place}: column {columns.history!r}"),
        Message("user", "\n".join(text for text in (prompt, more) if text)),
    ]


def _history(items: Any, place: str) -> list[Message]:
    """Messages before the prompt, of [prompt, response] pairs or of messages."""
    if items is None or items == "":
        return []
    if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
        return _messages(_items(items, place))
    if not isinstance(items, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in items):
        raise DataError(
            f"{place} must be a list of [prompt, response] pairs, or of messages with role and content, found "
            f"{_kind(items)}"
        )
    return [
        message
        for question, answer in items
        for message in (
            Message("user", checked_text(question, place)),
            Message("assistant", checked_text(answer, place), loss=True),
        )
    ]


def _tools_message(tools: Any, place: str, or_none: bool = False) -> list[Message]:
    """The system message about tools, which are a list or the JSON text of one; none for null or empty text.

    `or_none`: an empty list means no message too.
    """
    try:
        tools = checked_tools(tools)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
    if tools is None or (or_none and tools == []):
        return []
    if not isinstance(tools, list):
        raise DataError(f"{place} must be a list of tools, found {_kind(tools)}")
    return [Message("system", checked_text(TOOLS_INTRODUCTION + tools_json(tools), place))]


def no_records(path: Path) -> DataError:
    """The error about a file without any value."""
    return DataError(f"{path}: has no records; expected one JSON object per line")


def checked_text(text: Any, place: str) -> str:
    """`text` itself; DataError, beginning with `place`, if it is not a string that UTF-8 can encode."""
    if not isinstance(text, str):
        raise DataError(f"{place} must be a string, found {type(text).__name__}: {str(text)[:60]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} has half of a surrogate pair ({text[error.start]!r}) at character {error.start}; "
            "write the whole pair or remove it"
        ) from None
    return text


def parse_conversation(value: Any, place: str, columns: Columns | None = None) -> Messages:
    """Reader of ConversationDataLoader: assistant and observation have loss, there are no tools.

    Raises:
        DataError: anything that the official script refuses or ignores.
    """
    record = _conversation(value, place)
    remedy = "use data_loader.type: ToolAlpacaDataLoader"
    if record.get(_TOOLS) is not None:
        raise DataError(f"{place}: {_TOOLS!r} is not known to ConversationDataLoader; remove it, or {remedy}")
    messages = []
    for item, where in _conversation_items(record, place):
        if item["role"] == "tool":
            raise DataError(f"{where}: role 'tool' is not known to ConversationDataLoader; {remedy}")
        if _loss_flag(item, where) is not (item["role"] not in _WITHOUT_LOSS):
            raise DataError(f"{where}: 'loss' has no effect with ConversationDataLoader; remove it, or {remedy}")
        messages.append(_message(item, where))
    return _checked(messages, place)


def parse_tool_conversation(value: Any, place: str, columns: Columns | None = None) -> Messages:
    """Reader of ToolAlpacaDataLoader: conversations with tools and loss flags.

    The tools come first, as a system message. A message of the role `tool` becomes two: the call, of the assistant,
    and an observation without loss.

    Raises:
        DataError: another form than the one above, a flag without effect, or a call that could not be parsed again.
    """
    record = _conversation(value, place)
    tools = _tools_message(record.get(_TOOLS), f"{place}: {_TOOLS!r}")
    messages = [*tools, *_messages(_conversation_items(record, place))]
    return _checked(messages, place, with_tools=bool(tools))


def format_tool_call(parameters: Mapping[str, Any]) -> str:
    """`tool_call(city='Beijing', days=3)`: the text of a tool call of ChatGLM3, which `parse_tool_call` reads."""
    return f"tool_call({', '.join(f'{name}={value!r}' for name, value in parameters.items())})"


def tool_call_problem(parameters: Mapping[str, Any]) -> str | None:
    """Why `parse_tool_call` cannot read a call with these parameters; None if it can."""
    if _is_readable(parameters):
        return None
    for name in parameters:
        if not _is_readable({name: None}):
            return f"parameter {name!r} cannot be the name of an argument in Python; rename it, here and in 'tools'"
    return "the values of 'parameters' cannot be written as Python values (NaN or Infinity?); replace them"


def _is_readable(parameters: Mapping[str, Any]) -> bool:
    try:
        return parse_tool_call(format_tool_call(parameters)) == parameters
    except ToolCallError:
        return False


def _conversation(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'{place}: a record must be a JSON object {{"{_CONVERSATIONS}": [...]}}, found {type(value).__name__}'
        )
    _refuse_near_misses(value, (_CONVERSATIONS, _TOOLS), place)
    if _CONVERSATIONS not in value:
        raise DataError(
            f"{place}: no key {_CONVERSATIONS!r}, the record has {_names(value)}; "
            "a conversation is a list of messages under that key (records of prompt and response: ADGenDataLoader)"
        )
    for key in _CONTEXT:
        if key != _TOOLS and _is_filled(value.get(key)):
            raise DataError(f"{place}: {key!r} has no effect beside {_CONVERSATIONS!r}; write it as a message there")
    return value


def _conversation_items(record: Mapping[str, Any], place: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The messages of a conversation with their places."""
    items = record[_CONVERSATIONS]
    if not isinstance(items, list):
        raise DataError(f"{place}: {_CONVERSATIONS!r} must be a list of messages, found {_kind(items)}")
    if not items:
        raise DataError(f"{place}: {_CONVERSATIONS!r} is empty; remove the record")
    return _items(items, place)


def _items(items: list[Any], place: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Messages with their places; each is an object with a known role, and without a key that would be lost."""
    for number, item in enumerate(items, start=1):
        where = f"{place}: message {number}"
        if not isinstance(item, dict):
            raise DataError(f'{where} must be an object {{"role", "content"}}, found {_kind(item)}')
        _refuse_near_misses(item, _MESSAGE_KEYS, where)
        if "role" not in item:
            hint = "; 'from' and 'value' are called 'role' and 'content' here" if "from" in item else ""
            raise DataError(f"{where}: no key 'role', the message has {_names(item)}{hint}")
        role, roles = item["role"], (*ROLES, "tool")
        if role not in roles:
            hint = did_you_mean(role, roles, f"; the roles are {', '.join(roles)}")
            raise DataError(f"{where}: role {role!r} is not known{hint}")
        for key in OF_CHATGLM3:  # tools belong to the record, calls to messages of the role `tool`
            if _is_filled(item.get(key)):
                raise DataError(
                    f"{where}: {key!r} has no effect; write tools beside {_CONVERSATIONS!r} and a call as a message of "
                    "the role 'tool' (ToolAlpacaDataLoader), or remove it"
                )
        yield item, where


def _messages(items: Iterable[tuple[Mapping[str, Any], str]]) -> list[Message]:
    """Messages of items with their places."""
    messages: list[Message] = []
    for item, where in items:
        messages += _tool_messages(item, where) if item["role"] == "tool" else [_message(item, where)]
    return messages


def _message(item: Mapping[str, Any], where: str) -> Message:
    """A message of another role than `tool`."""
    for key in _TOOL_KEYS:
        if item.get(key) is not None:
            raise DataError(f"{where}: {key!r} has no effect with role {item['role']!r}; remove it")
    return Message(item["role"], _content(item, where), loss=_loss_flag(item, where))


def _refuse_near_misses(value: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    """More keys are allowed, but one that is nearly a known key is a typing error."""
    for key in value:
        near = [] if key in known else misspelled(key, known)
        if near and near[0] not in value:
            raise DataError(f"{place}: key {key!r} is not known; did you mean {near[0]!r}?")


def _content(item: Mapping[str, Any], where: str) -> str:
    if "content" not in item:
        raise DataError(f"{where}: no key 'content', the message has {_names(item)}")
    return checked_text(item["content"], f"{where}: 'content'")


def _loss_flag(item: Mapping[str, Any], where: str) -> bool:
    bears_loss = item["role"] not in _WITHOUT_LOSS
    flag = item.get("loss", bears_loss)
    if not isinstance(flag, bool):
        raise DataError(f"{where}: 'loss' must be true or false, found {_kind(flag)}")
    if flag and not bears_loss:
        raise DataError(f"{where}: 'loss': true has no effect with role {item['role']!r}; remove it")
    return flag


def _tool_messages(item: Mapping[str, Any], where: str) -> list[Message]:
    for key in _TOOL_KEYS:
        if key not in item:
            raise DataError(f"{where}: no key {key!r}; a tool message has {', '.join(_TOOL_KEYS)}")
    if item.get("content") is not None:
        raise DataError(f"{where}: 'content' has no effect with role 'tool'; remove it")
    name, parameters, observation = (item[key] for key in _TOOL_KEYS)
    checked_text(name, f"{where}: 'name'")
    if not name.strip() or "\n" in name:
        raise DataError(f"{where}: 'name' must be the name of the tool, found {name!r}")
    if not isinstance(parameters, dict):
        raise DataError(f"{where}: 'parameters' must be an object, found {_kind(parameters)}")
    problem = tool_call_problem(parameters)
    if problem:
        raise DataError(f"{where}: {problem}")
    if not isinstance(observation, str):
        observation = json.dumps(observation, ensure_ascii=False)
    call = f"```python\n{format_tool_call(parameters)}\n```"
    return [
        Message("assistant", checked_text(call, f"{where}: 'parameters'"), name, _loss_flag(item, where)),
        Message("observation", checked_text(observation, f"{where}: 'observation'")),
    ]


def _checked(messages: list[Message], place: str, with_tools: bool = False) -> Messages:
    """Checks of the conversation as a whole."""
    systems = [number for number, message in enumerate(messages) if message.role == "system"]
    if len(systems) > 1 + with_tools:  # the tools are a system message, too
        raise DataError(f"{place}: {len(systems) - with_tools} system messages; at most one is allowed")
    if systems and systems[-1] != len(systems) - 1:
        raise DataError(f"{place}: a system message must be the first one; move it to the front")
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{place}: no message of the assistant, so there is nothing to learn; remove the record")
    return tuple(messages)


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, value)) or "none"


def _kind(value: Any) -> str:
    return f"{type(value).__name__}: {json.dumps(value, ensure_ascii=False)[:60]}"
