"""Hundreds of changed records and prompts: each is refused by place, told, or makes other messages."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from data_helpers import COLUMNS, loader_section

from glm_ms.data.encoder import Columns, Messages
from glm_ms.data.formats import FORMATS
from glm_ms.data.records import parse_prompt
from glm_ms.storage.errors import DataError

NAMED = Columns.of(loader_section("ADGenDataLoader", COLUMNS, history_column="h", system_column="s", input_column="i"))
MESSAGES = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
TOOL = {"role": "tool", "name": "f", "parameters": {"x": 1, "y": ["z"]}, "observation": {"o": 2}}
TOOLS = [{"name": "f", "parameters": {"x": {"type": "string"}}}]
LAST = {"role": "assistant", "content": "二", "loss": False}
CHAT = [{"role": "system", "content": "零"}, *MESSAGES]
# Format of FORMATS, None: a prompt -> records.
RECORDS: list[tuple[str | None, Any]] = [
    ("ADGenDataLoader", {"content": "甲", "summary": "乙"}),
    ("ADGenDataLoader", {"content": "甲", "summary": "乙", "h": [["一", "二"]], "s": "零", "i": "丙"}),
    ("ADGenDataLoader", {"content": "甲", "summary": "乙", "h": MESSAGES}),
    ("ConversationDataLoader", {"conversations": CHAT}),
    ("ToolAlpacaDataLoader", {"conversations": [*CHAT, MESSAGES[0], TOOL, LAST], "tools": TOOLS}),
    (None, {"prompt": "甲", "history": [["一", "二"]], "system": "零", "input": "丙", "tools": TOOLS}),
    (None, {"query": "甲", "history": MESSAGES}),
    (None, {"conversations": [*MESSAGES, TOOL], "tools": json.dumps(TOOLS)}),
]  # fmt: skip
VALUES = (
    None,
    "",
    " ",
    "x",
    0,
    5,
    1.5,
    True,
    [],
    ["x"],
    [["a", "b"]],
    {},
    {"a": 1},
    "[]",
    '{"a": 1}',
    "\ud83d",
    10**30,
)
KEYS = (
    "history", "system", "tools", "input", "instruction", "role", "loss", "metadata", "name", "parameters", "content",
    "tool_calls", "function_call", "observation", "conversations", "messages", "id", "prompt",
)  # fmt: skip
EMPTY = (None, "", [], {})


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def mutations(record: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Changed records, with the value before and the one after."""
    for path in [(), *places(record)]:
        for new in VALUES:
            if path:
                changed = copy.deepcopy(record)
                at(changed, path[:-1])[path[-1]] = new
                yield changed, at(record, path), new
            elif isinstance(new, (dict, list, str)):
                yield new, record, new
        if isinstance(at(record, path), dict):
            for key in KEYS:
                for new in ("x", ["x"], {"a": 1}, None):
                    changed = copy.deepcopy(record)
                    old = at(changed, path).get(key)
                    at(changed, path)[key] = new
                    yield changed, old, new
            for key in at(record, path):
                for name in (f"{key}{key[-1:]}", key.upper(), key[:-1]):
                    changed = copy.deepcopy(record)
                    section = at(changed, path)
                    section[name] = section.pop(key)
                    yield changed, key, name


def read(kind: str | None, value: Any, told: set[str]) -> Messages | None:
    if kind is None:
        if not isinstance(value, dict):
            raise DataError("f:1: refused by its type")
        return parse_prompt(value, "f:1", told)
    messages = FORMATS[kind].read(value, "f:1", NAMED)
    told.update(FORMATS[kind].left_out(value, NAMED))
    return messages


def test_no_change_of_a_record_is_lost() -> None:
    refused = told = changed = number = 0
    lost = []
    for kind, record in RECORDS:
        before = read(kind, record, set())
        for value, old, new in mutations(record):
            number += 1
            names: set[str] = set()
            try:
                after = read(kind, value, names)
            except DataError as error:
                refused += str(error).startswith("f:1: ")
                continue
            if names:
                told += 1
            elif after != before:
                changed += 1
            elif old == new or (old in EMPTY and new in EMPTY):
                number -= 1  # the same record
            else:
                lost.append((kind, value, old, new))
    assert lost == []
    assert refused + told + changed == number
    assert min(refused, told, changed) > 100, (refused, told, changed, number)
