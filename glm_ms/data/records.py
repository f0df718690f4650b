"""Readers of records: JSON values to checked messages.

Conversations have two forms, that of `finetune_hf.py` of ChatGLM3 (`parse_conversation`):

    {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

and the earlier one of `finetune_chatmodel_demo` (`parse_tool_conversation`), in which a conversation may have tools,
messages with the role `tool` (a call and its result), and messages that take no part in the loss:

    {"tools": [...], "conversations": [{"role": "user", "content": "..."},
      {"role": "assistant", "content": "...", "loss": false},
      {"role": "tool", "name": "...", "parameters": {...}, "observation": ...}, ...]}

Every reader takes a JSON value, its place (`file:line`, the beginning of errors) and `origin_columns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.data.encoder import Message, Messages
from glm_ms.storage.errors import DataError
from glm_ms.storage.suggest import did_you_mean, misspelled
from glm_ms.tokenizer.chatglm3 import ROLES, ToolCallError, parse_tool_call

_CONVERSATIONS, _TOOLS = "conversations", "tools"
_MESSAGE_KEYS = ("role", "content", "loss", "name", "parameters", "observation", "metadata")
_TOOL_KEYS = ("name", "parameters", "observation")
_WITHOUT_LOSS = ("system", "user")
# These words are part of what the released model was trained on.
_TOOLS_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:\n"


def read_prompt_and_answer(value: Any, place: str, columns: Sequence[str]) -> Messages | None:
    """Reader of ADGenDataLoader: messages of user and assistant in turn, the answers with loss.

    Args:
        columns: names of the prompt and the answer column, and optionally of a history column, whose value is a list
            of [prompt, answer] pairs.

    Returns:
        The messages; None if prompt or answer is empty or null, which the reference skips too.

    Raises:
        DataError: the value is not an object, a column is missing or not a string, or `columns` has another length.
    """
    if isinstance(columns, str) or len(columns) not in (2, 3):
        raise DataError(f"columns = {columns!r}: must name prompt and response, optionally history")
    if not isinstance(value, dict):
        example = ", ".join(f"{json.dumps(name)}: ..." for name in columns)
        raise DataError(f"{place}: a record must be a JSON object such as {{{example}}}, found {type(value).__name__}")
    for name in columns:
        if name not in value:
            raise DataError(
                f"{place}: no column {name!r}, the record has {_names(value)}{did_you_mean(name, value)} "
                "Name the columns of the file in origin_columns"
            )
    prompt, answer = (
        "" if value[name] is None else checked_text(value[name], f"{place}: column {name!r}") for name in columns[:2]
    )
    history = _history(value[columns[2]], f"{place}: column {columns[2]!r}") if len(columns) == 3 else ()
    if not prompt or not answer:
        return None
    return tuple(
        message
        for question, reply in [*history, (prompt, answer)]
        for message in (Message("user", question), Message("assistant", reply, loss=True))
    )


def _history(pairs: Any, place: str) -> tuple[tuple[str, str], ...]:
    if pairs is None:
        return ()
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(f"{place} must be a list of [prompt, response] pairs, found {str(pairs)[:60]}")
    return tuple((checked_text(first, place), checked_text(second, place)) for first, second in pairs)


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


def parse_conversation(value: Any, place: str, columns: Sequence[str] = ()) -> Messages:
    """Reader of ConversationDataLoader: assistant and observation have loss, there are no tools.

    Raises:
        DataError: anything that the official script refuses or ignores.
    """
    record = _conversation(value, place)
    remedy = "use data_loader.type: ToolAlpacaDataLoader"
    if record.get(_TOOLS) is not None:
        raise DataError(f"{place}: {_TOOLS!r} is not known to ConversationDataLoader; remove it, or {remedy}")
    messages = []
    for item, where in _items(record, place):
        if item["role"] == "tool":
            raise DataError(f"{where}: role 'tool' is not known to ConversationDataLoader; {remedy}")
        loss = item["role"] not in _WITHOUT_LOSS
        if _loss_flag(item, where) is not loss:
            raise DataError(f"{where}: 'loss' has no effect with ConversationDataLoader; remove it, or {remedy}")
        messages.append(Message(item["role"], _content(item, where), loss=loss))
    return _checked(messages, place)


def parse_tool_conversation(value: Any, place: str, columns: Sequence[str] = ()) -> Messages:
    """Reader of ToolAlpacaDataLoader: conversations with tools and loss flags.

    The tools come first, as a system message. A message of the role `tool` becomes two: the call, of the assistant,
    and an observation without loss.

    Raises:
        DataError: another form than the one above, a flag without effect, or a call that could not be parsed again.
    """
    record = _conversation(value, place)
    tools = record.get(_TOOLS)
    messages = []
    if tools is not None:
        text = _TOOLS_INTRODUCTION + json.dumps(tools, indent=4, ensure_ascii=False)
        messages.append(Message("system", checked_text(text, f"{place}: {_TOOLS!r}")))
    for item, where in _items(record, place):
        loss = _loss_flag(item, where)
        if item["role"] == "tool":
            messages += _tool_messages(item, where, loss)
            continue
        for key in _TOOL_KEYS:
            if item.get(key) is not None:
                raise DataError(f"{where}: {key!r} has no effect with role {item['role']!r}; remove it")
        messages.append(Message(item["role"], _content(item, where), loss=loss))
    return _checked(messages, place, with_tools=tools is not None)


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
    return value


def _items(record: Mapping[str, Any], place: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The messages with their places; each is an object with a known role."""
    items = record[_CONVERSATIONS]
    if not isinstance(items, list):
        raise DataError(f"{place}: {_CONVERSATIONS!r} must be a list of messages, found {_kind(items)}")
    if not items:
        raise DataError(f"{place}: {_CONVERSATIONS!r} is empty; remove the record")
    for number, item in enumerate(items, start=1):
        where = f"{place}: message {number}"
        if not isinstance(item, dict):
            raise DataError(f'{where} must be an object {{"role", "content"}}, found {_kind(item)}')
        _refuse_near_misses(item, _MESSAGE_KEYS, where)
        if "role" not in item:
            raise DataError(f"{where}: no key 'role', the message has {_names(item)}")
        role, roles = item["role"], (*ROLES, "tool")
        if role not in roles:
            hint = did_you_mean(role, roles, f"; the roles are {', '.join(roles)}")
            raise DataError(f"{where}: role {role!r} is not known{hint}")
        if item.get("metadata"):
            raise DataError(
                f"{where}: 'metadata' has no effect; write a call as a message of the role 'tool' "
                "(ToolAlpacaDataLoader), or remove it"
            )
        yield item, where


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


def _tool_messages(item: Mapping[str, Any], where: str, loss: bool) -> list[Message]:
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
        Message("assistant", checked_text(call, f"{where}: 'parameters'"), name, loss),
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
