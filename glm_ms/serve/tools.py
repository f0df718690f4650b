"""Tools that a model may call: their definitions in requests, and the choice among them."""

from __future__ import annotations

import json
import keyword
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glm_ms.serve.call_grammar import SchemaError, calls_grammar, not_enforced
from glm_ms.serve.errors import wrong_field

_LONGEST_NAME = 64
_NOT_IN_NAMES = re.compile(r"\W")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Calls are Python code, so an argument whose name cannot be one there (`from`, `user-id`) has another name in the
    prompt and in the calls.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]  # JSON schema, with the names of the arguments in the prompt
    renamed: Mapping[str, str] = field(default_factory=dict)  # name in the prompt -> name in the schema
    strict: bool = False  # arguments follow the schema, also when the model is free to call or not

    def for_prompt(self) -> dict[str, Any]:
        """The description that the model reads."""
        text = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **text, "parameters": self.parameters}

    def given_names(self) -> list[str]:
        """The names of the arguments in the schema of the request."""
        return [self.renamed.get(name, name) for name in self.parameters.get("properties") or {}]

    def arguments(self, text: str) -> str:
        """The JSON object of a call, with the names of the request."""
        if not self.renamed:
            return text
        values = {self.renamed.get(name, name): value for name, value in json.loads(text).items()}
        return json.dumps(values, ensure_ascii=False)


@dataclass(frozen=True)
class ToolChoice:
    """Which tools the model may call, and whether it must."""

    mode: str = "none"  # "none", "auto" (the model decides) or "required"
    offered: tuple[Tool, ...] = ()  # that the prompt describes
    named: str | None = None  # with "required": the only one of them that may be called
    parallel: bool = True  # several calls in one answer

    @property
    def guided(self) -> bool:
        """Whether a grammar is needed."""
        return self.mode == "required" or (self.mode == "auto" and any(tool.strict for tool in self.offered))


def read_tools(items: Any, place: str = "tools") -> list[Tool]:
    """Checks tools in OpenAI's form; None is no tool.

    Raises:
        APIError: 400; it names the field.
    """
    if items is None:
        return []
    if not isinstance(items, list):
        raise wrong_field(place, f"must be a list of tools, found {items!r:.60}")
    tools: list[Tool] = []
    for number, item in enumerate(items):
        function = item.get("function") if isinstance(item, dict) else None
        where = f"{place}[{number}]"
        if not isinstance(function, dict) or item.get("type") != "function":
            raise wrong_field(where, "must be an object of the type function with an object function")
        tools.append(read_function(function, f"{where}.function"))
    return checked_names(tools, place)


def checked_names(tools: list[Tool], place: str = "tools") -> list[Tool]:
    """The tools themselves; APIError if two have the same name."""
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise wrong_field(place, f"two tools have the name {twice!r}")
    return tools


def read_function(function: Mapping[str, Any], place: str, schema_key: str = "parameters") -> Tool:
    """A tool from its name, description and JSON schema.

    Raises:
        APIError: 400; it names the field.
    """
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise wrong_field(f"{place}.name", f"must be a name of 1 to {_LONGEST_NAME} characters, found {name!r:.80}")
    description = function.get("description")
    if not isinstance(description, (str, type(None))):
        raise wrong_field(f"{place}.description", f"must be a text, found {description!r:.60}")
    where, schema = f"{place}.{schema_key}", function.get(schema_key)
    schema = {"type": "object", "properties": {}} if schema is None else schema
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise wrong_field(where, "must be a JSON schema of the type object")
    if not isinstance(schema.get("properties", {}), dict):
        raise wrong_field(f"{where}.properties", "must be an object")
    if not isinstance(schema.get("required") or [], list):
        raise wrong_field(f"{where}.required", "must be a list of names in properties")
    tool = Tool(name.strip(), description, *_for_python(schema), strict=function.get("strict") is True)
    loose = not_enforced(tool.parameters) if tool.strict else None
    if loose is not None:
        raise wrong_field(f"{place}.strict", f"{loose} of the schema is not enforced; remove one of the two")
    return tool


def read_choice(value: Any, parallel: bool | None, tools: list[Tool], place: str = "tool_choice") -> ToolChoice:
    """Checks a `tool_choice` in OpenAI's form.

    Raises:
        APIError: 400; it names the field.
    """
    named = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return choice_of(named["name"], parallel, tools, place)
    if value is not None and value not in ("none", "auto", "required"):
        expected = "none, auto, required or an object of the type function with the name of one"
        raise wrong_field(place, f"must be {expected}, found {value!r:.80}")
    if value == "required" and not tools:
        raise wrong_field(place, "required needs tools")
    mode = value if tools and value is not None else "auto" if tools else "none"
    return ToolChoice(mode, tuple(tools), parallel=parallel is not False)


def choice_of(name: str, parallel: bool | None, tools: list[Tool], place: str) -> ToolChoice:
    """The choice of one tool by its name; APIError if there is no such tool."""
    if not any(tool.name == name for tool in tools):
        known = ", ".join(tool.name for tool in tools) or "none"
        raise wrong_field(place, f"no tool has the name {name!r:.80}; the tools are: {known[:200]}")
    return ToolChoice("required", tuple(tools), name, parallel is not False)


def choice_grammar(choice: ToolChoice, separator: str, text: str, always: bool = False) -> str | None:
    """Lark grammar of an answer that keeps to a choice of tools; None if the model is free, or has no tools.

    Args:
        separator: special token between two messages of an answer.
        text: Lark expression of an answer without calls.
        always: a grammar also where the model is free to call a tool or not.

    Raises:
        APIError: 400, a schema is wrong.
    """
    if not choice.guided and not (always and choice.mode == "auto"):
        return None
    schemas = [(tool.name, tool.parameters) for tool in choice.offered if choice.named in (None, tool.name)]
    try:
        return calls_grammar(schemas, choice.parallel, separator, None if choice.mode == "required" else text)
    except SchemaError as error:
        raise wrong_field("tools", str(error)) from None


def python_names(keys: Iterable[str]) -> dict[str, str]:
    """For each key a name that can be that of an argument in Python; the key itself if it can, and no name twice."""
    distinct = list(dict.fromkeys(keys))
    taken = {key for key in distinct if _is_name(key)}
    names = {}
    for key in distinct:
        name = key
        if not _is_name(key):
            name = _NOT_IN_NAMES.sub("_", unicodedata.normalize("NFKC", key))
            name = name if _is_name(name) else f"{name}_" if _is_name(f"{name}_") else f"_{name}"
            while name in taken:
                name += "_"
            taken.add(name)
        names[key] = name
    return names


def _is_name(text: str) -> bool:
    # Python reads names in the form NFKC.
    return text.isidentifier() and not keyword.iskeyword(text) and unicodedata.normalize("NFKC", text) == text


def _for_python(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """A schema whose properties have names for Python, and those that differ -> the names before."""
    names = python_names(schema.get("properties") or {})
    changed = {new: old for old, new in names.items() if new != old}
    if not changed:
        return schema, {}
    properties = {names[key]: item for key, item in schema["properties"].items()}
    required = [names.get(key, key) if isinstance(key, str) else key for key in schema.get("required") or []]
    return {**schema, "properties": properties, **({"required": required} if required else {})}, changed
