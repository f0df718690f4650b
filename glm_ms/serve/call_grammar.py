r"""The grammar of ChatGLM3's tool calls, in Lark, from the JSON schemas of the parameters.

A call is the name of the tool, a line break, and Python code in a fence:

    get_weather
     ```python
    tool_call(city='Beijing', days=3)
    ```
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Python literals without line breaks. Escapes of half surrogates, which are not text, are left out; numbers have a
# bounded length, as Python refuses to read the longest ones.
_TERMINALS = r"""
STRING: /'([^'\\\x00-\x1f\x7f]|\\(['"\\nrt]|u([0-9a-ce-f][0-9a-f]{3}|d[0-7][0-9a-f]{2})))*'/
  | /"([^"\\\x00-\x1f\x7f]|\\(['"\\nrt]|u([0-9a-ce-f][0-9a-f]{3}|d[0-7][0-9a-f]{2})))*"/
INTEGER: /-?(0|[1-9][0-9]{0,17})/
NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?(e[+-]?[0-9]{1,2})?/
NAME: /[A-Za-z_][A-Za-z0-9_]{0,63}/
boolean: "True" | "False"
any_list: "[" (value (", " value)*)? "]"
any_dict: "{" (STRING ": " value (", " STRING ": " value)*)? "}"
value: STRING | NUMBER | boolean | "None" | any_list | any_dict
"""
_TYPES = {
    "string": "STRING",
    "integer": "INTEGER",
    "number": "NUMBER",
    "boolean": "boolean",
    "null": '"None"',
    "array": "any_list",
    "object": "any_dict",
}
_ANNOTATIONS = ("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated")
_GROUPS = ("$defs", "definitions", "properties")  # of named schemas
_ENFORCED = ("type", "enum", "const", "$ref", "required", "additionalProperties", "items", "minItems", "maxItems")
_MOST_ITEMS = 1000  # of minItems and maxItems; a grammar spells them out
_ROOT = re.compile(r"#/(\$defs|definitions)/([^/]+)")


class SchemaError(ValueError):
    """The parameters of a tool cannot become a grammar. The message begins with the place in the schema."""


def calls_grammar(
    tools: Sequence[tuple[str, Mapping[str, Any]]], parallel: bool, separator: str, text: str | None = None
) -> str:
    """Lark grammar of an answer that calls tools.

    Args:
        tools: name and JSON schema of the arguments of each.
        parallel: several calls may follow each other.
        separator: special token between the messages of one answer.
        text: expression of a text that may come first, and that calls need not follow; None: only calls.

    Raises:
        SchemaError: a schema is wrong.
    """
    grammar = _Grammar()
    names = [grammar.call(name, schema) for name, schema in tools]
    calls = f"call ({separator} call)*" if parallel else "call"
    start = calls if text is None else f"{calls} | text ({separator} {calls})?"
    rules = [f"start: {start}", f"call: {' | '.join(names)}", *grammar.rules]
    if text is not None:
        rules.append(f"text: {text}")
    return "\n".join(rules) + _TERMINALS


def not_enforced(schema: Any) -> str | None:
    """The first keyword of a schema that the grammar does not enforce, as a path; None if it enforces all."""
    return next(_loose(schema, ""), None)


def _loose(schema: Any, place: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    for key, item in schema.items():
        if key in _GROUPS and isinstance(item, Mapping):
            for name, inner in item.items():
                yield from _loose(inner, f"{place}{key}.{name}.")
        elif key in ("anyOf", "oneOf") and isinstance(item, list):
            for number, inner in enumerate(item):
                yield from _loose(inner, f"{place}{key}[{number}].")
        elif key in ("items", "additionalProperties"):
            yield from _loose(item, f"{place}{key}.")
        elif key not in _ENFORCED and key not in _ANNOTATIONS:
            yield place + key


class _Grammar:
    """Rules of calls. A rule has a number, so that names of tools and arguments need not be names of rules."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self._count = 0
        self._references: dict[str, str] = {}
        self._definitions: Mapping[str, Any] = {}

    def call(self, name: str, schema: Mapping[str, Any]) -> str:
        self._definitions, self._references = schema, {}
        arguments = self._arguments(schema, name)
        fence = '"\\n" " "? "```python\\ntool_call("'
        return self._rule(f'" "? {_literal(name)} {fence} {arguments} ")\\n```"')

    def _arguments(self, schema: Mapping[str, Any], place: str) -> str:
        for key in ("$ref", "anyOf", "oneOf", "allOf"):
            if key in schema:
                raise SchemaError(f"{place}: {key} instead of properties cannot be enforced; list the properties")
        properties = _object(schema, "properties", place)
        if not properties and schema.get("additionalProperties"):
            value = self._value(schema["additionalProperties"], f"{place}.additionalProperties")
            return f'(NAME "=" {value} (", " NAME "=" {value})*)?'
        return self._members(schema, place, lambda key: _literal(f"{key}="))

    def _members(self, schema: Mapping[str, Any], place: str, opening: Any) -> str:
        """The properties of an object in their order; those that are not required may be missing."""
        properties = _object(schema, "properties", place)
        required = schema.get("required") or []
        if not isinstance(required, list) or not set(map(str, required)) <= set(properties):
            raise SchemaError(f"{place}.required: must be a list of names in properties, found {required!r:.60}")
        # From the last to the first: what may follow when nothing, or something, is written already.
        at_first, later = '""', '""'
        for key in reversed(list(properties)):
            item = f"{opening(key)} {self._value(properties[key], f'{place}.properties.{key}')}"
            optional = "" if key in required else " | {}"
            at_first, later = (
                self._rule(f"{item} {later}" + optional.format(at_first)),
                self._rule(f'", " {item} {later}' + optional.format(later)),
            )
        return at_first

    def _value(self, schema: Any, place: str) -> str:
        """Expression of the values that a schema describes."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise SchemaError(f"{place}: must be a JSON schema, found {schema!r:.60}")
        if "$ref" in schema:
            return self._reference(schema["$ref"], place)
        if "const" in schema:
            return _literal(repr(schema["const"]))
        if "enum" in schema:
            return self._enum(schema["enum"], place)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                items = schema[key]
                if not isinstance(items, list) or not items:
                    raise SchemaError(f"{place}.{key}: must be a list of JSON schemas, found {items!r:.60}")
                return self._rule(" | ".join(self._value(item, f"{place}.{key}[{i}]") for i, item in enumerate(items)))
        return self._typed(schema, place)

    def _typed(self, schema: Mapping[str, Any], place: str) -> str:
        given = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else None)
        if given is None:
            return "value"
        kinds = given if isinstance(given, list) else [given]
        for kind in kinds:
            if not isinstance(kind, str) or kind not in _TYPES:
                raise SchemaError(f"{place}.type: must be one of {', '.join(_TYPES)}, found {kind!r:.60}")
        return self._rule(" | ".join(self._of_type(kind, schema, place) for kind in kinds)) if kinds else "value"

    def _of_type(self, kind: str, schema: Mapping[str, Any], place: str) -> str:
        if kind == "array" and not schema.keys().isdisjoint(("items", "minItems", "maxItems")):
            return self._list(schema, place)
        if kind == "object" and schema.get("properties"):
            members = self._members(schema, place, lambda key: _literal(f"{key!r}: "))
            return f'"{{" {members} "}}"'
        if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
            value = self._value(schema["additionalProperties"], f"{place}.additionalProperties")
            return f'"{{" (STRING ": " {value} (", " STRING ": " {value})*)? "}}"'
        return _TYPES[kind]

    def _list(self, schema: Mapping[str, Any], place: str) -> str:
        item = self._value(schema.get("items", True), f"{place}.items")
        least, most = (_count(schema, key, place) for key in ("minItems", "maxItems"))
        least = least or 0
        if most is not None and most < least:
            raise SchemaError(f"{place}.maxItems = {most}: is below minItems = {least}")
        if most == 0:
            return '"[]"'
        repeat = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = f'{item} (", " {item}){repeat}'
        return f'"[" {some} "]"' if least else f'"[" ({some})? "]"'

    def _enum(self, values: Any, place: str) -> str:
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{place}.enum: must be a list with a value, found {values!r:.60}")
        return self._rule(" | ".join(_literal(repr(value)) for value in values))

    def _reference(self, target: Any, place: str) -> str:
        match = _ROOT.fullmatch(target) if isinstance(target, str) else None
        group = self._definitions.get(match[1]) if match else None
        if match is None or not isinstance(group, Mapping) or match[2] not in group:
            raise SchemaError(f"{place}.$ref: must name an entry of $defs of this schema, found {target!r:.60}")
        if target not in self._references:
            # The rule is named before it is made: a schema may contain itself.
            name = self._references[target] = self._new_name()
            self.rules.append(f"{name}: {self._value(group[match[2]], target)}")
        return self._references[target]

    def _rule(self, body: str) -> str:
        name = self._new_name()
        self.rules.append(f"{name}: {body}")
        return name

    def _new_name(self) -> str:
        self._count += 1
        return f"r{self._count}"


def _literal(text: str) -> str:
    """A text as a terminal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _object(schema: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    value = schema.get(key) or {}
    if not isinstance(value, Mapping):
        raise SchemaError(f"{place}.{key}: must be an object, found {value!r:.60}")
    return value


def _count(schema: Mapping[str, Any], key: str, place: str) -> int | None:
    value = schema.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_ITEMS:
        raise SchemaError(f"{place}.{key} = {value!r:.60}: must be a number in [0, {_MOST_ITEMS}]")
    return value
