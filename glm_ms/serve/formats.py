"""The form of the text of an answer that a request asks for, as a grammar: `response_format`, `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_ms.serve.chat_request import StructuredOutputs
from glm_ms.serve.errors import APIError, wrong_field
from glm_ms.serve.guides import Grammar, GuideError, choice, json_schema, lark, regex
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json

_ANY_OBJECT = {"type": "object"}


def response_grammar(value: Mapping[str, Any] | None, place: str = "response_format") -> Grammar | None:
    """The grammar of a `response_format` of OpenAI; None for text.

    Raises:
        APIError: 400; it names the field.
    """
    kind = "text" if value is None else value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema(_ANY_OBJECT, place)
    if kind != "json_schema" or value is None:
        raise wrong_field(f"{place}.type", f"must be text, json_object or json_schema, found {kind!r:.60}")
    inner = value.get("json_schema", value)  # beside it, in the form of /v1/responses
    if not isinstance(inner, Mapping) or "schema" not in inner:
        raise wrong_field(f"{place}.json_schema", "must be an object with schema")
    return _schema(inner["schema"], f"{place}.json_schema.schema")


def structured_grammar(value: StructuredOutputs) -> Grammar:
    """The grammar of `structured_outputs`; APIError as of `response_grammar`."""
    if value.regex is not None:
        return regex(value.regex)
    if value.choice is not None:
        return choice(value.choice)
    if value.grammar is not None:
        return lark(value.grammar)
    given = value.json_ if value.json_ is not None else _ANY_OBJECT
    place = "structured_outputs.json"
    if isinstance(given, str):
        try:
            given = parse_json(given, place)
        except FileError as error:
            raise APIError(400, str(error), place) from None
    return _schema(given, place)


def _schema(schema: Any, place: str) -> Grammar:
    try:
        return json_schema(schema)
    except GuideError as error:
        raise wrong_field(place, str(error)) from None
