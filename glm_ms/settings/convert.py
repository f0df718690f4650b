"""Entries -> the dataclasses of the schema, by their type hints; every problem is collected."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from glm_ms.settings.document import Entry
from glm_ms.settings.errors import described
from glm_ms.settings.schema import Settings, keys_of, leaf_keys
from glm_ms.storage.numbers import exponent_number
from glm_ms.storage.suggest import did_you_mean, nearest

_EXPECTED = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


class _BadValueError(Exception):
    """What is wrong with one value, without its place; turned into a line of the report."""


class Converter:
    """Converts a document.

    Attributes:
        problems: a message for each problem found.
        origins: dotted key -> where its value was written.
        unusable: dotted keys whose value is not the user's because of a problem.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.origins: dict[str, str] = {}
        self.unusable: set[str] = set()

    def section(self, kind: type, entry: Entry, path: str = "") -> Any:
        """Builds dataclass `kind` from a mapping; keys that are absent keep their default.

        Args:
            kind: a settings dataclass.
            entry: a mapping, or null for an empty section.
            path: dotted name of the section, "" for the top level.
        """
        fields = {item.name: item for item in keys_of(kind)}
        values: dict[str, Any] = {}
        if not entry.is_section:
            if entry.value is not None:
                expected = f"expected a section with {', '.join(list(fields)[:4])} ..."
                self._bad(path, entry, f"{expected}, found {described(entry.value)}")
            return kind()
        hints = get_type_hints(kind)
        for name, item in entry.value.items():
            dotted = f"{path}.{name}" if path else name
            if name not in fields:
                self._unknown(dotted, path, item, fields)
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self.section(hints[name], item, dotted)
            else:
                self._leaf(fields[name], hints[name], item, dotted, values)
        return kind(**values)

    def _leaf(
        self, field: dataclasses.Field, hint: Any, entry: Entry, dotted: str, values: dict[str, Any]
    ) -> None:
        self.origins[dotted] = entry.where
        try:
            value = _empty_text(field, hint, entry)
            values[field.name] = _convert(hint, entry, field) if value is None else value
        except _BadValueError as error:
            self._bad(dotted, entry, str(error))

    def _bad(self, dotted: str, entry: Entry, message: str) -> None:
        self.unusable.add(dotted)
        self.problems.append(f"{entry.where}: {dotted}: {message}")

    def _unknown(self, dotted: str, path: str, entry: Entry, fields: dict[str, Any]) -> None:
        name = dotted.rpartition(".")[2]
        hint = did_you_mean(name, fields)
        self.unusable.update(f"{path}.{near}" if path else near for near in nearest(name, fields))
        if not hint:
            elsewhere = [key for key in leaf_keys() if key.rpartition(".")[2] == name]
            elsewhere += [item.name for item in keys_of(Settings) if item.name == name]
            hint = f"; the key is {' or '.join(elsewhere[:3])}" if elsewhere else ""
        if not hint:
            hint = f"; known here: {', '.join(fields)}"
        self.problems.append(f"{entry.key_where or entry.where}: {dotted}: unknown key{hint}")


def _empty_text(field: dataclasses.Field, hint: Any, entry: Entry) -> str | None:
    """A text key that is empty by default may be written empty: `load_checkpoint:`."""
    return "" if hint is str and entry.value is None and entry.text is None and field.default == "" else None


def _convert(hint: Any, entry: Entry, field: dataclasses.Field) -> Any:
    """The value of an entry as `hint` asks. Raises _BadValueError."""
    origin = get_origin(hint)
    if origin is Literal:
        return _one_of(get_args(hint), entry)
    if hint is str and "choices" in field.metadata:
        return _one_of(tuple(field.metadata["choices"]()), entry)
    if origin is Union:
        return _any_of(get_args(hint), entry, field)
    if origin is list:
        return _list(get_args(hint)[0], entry, field)
    return _in_range(_scalar(hint, entry), field)


def _any_of(hints: tuple[Any, ...], entry: Entry, field: dataclasses.Field) -> Any:
    if type(None) in hints and (entry.value is None or entry.value == "None"):
        return None
    kinds = [hint for hint in hints if hint is not type(None)]
    failures = []
    for hint in kinds:
        try:
            return _convert(hint, entry, field)
        except _BadValueError as error:
            failures.append(error)
    if len(kinds) == 1:
        raise failures[0]
    expected = [_expected(hint) for hint in kinds]
    raise _BadValueError(f"expected {' or '.join(expected)}, found {described(entry.value)}")


def _expected(hint: Any) -> str:
    """A type in the words of an error."""
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    return "a list" if get_origin(hint) is list else " or ".join(map(repr, get_args(hint)))


def _one_of(choices: tuple[Any, ...], entry: Entry) -> Any:
    value = entry.value
    if entry.text is not None and isinstance(choices[0], str):
        value = entry.text
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    hint = did_you_mean(value, [str(choice) for choice in choices]) if isinstance(value, str) else ""
    allowed = ", ".join(str(choice) for choice in choices)
    raise _BadValueError(f"found {described(value)}, allowed: {allowed}{hint}")


def _list(hint: Any, entry: Entry, field: dataclasses.Field) -> list[Any]:
    items = entry.value
    if not isinstance(items, list):
        if not field.metadata.get("or_one") or entry.value is None:
            raise _BadValueError(f"expected a list, found {described(entry.value)}; write [a, b]")
        items = [entry]
    length = field.metadata.get("length")
    if length is not None and len(items) != length:
        raise _BadValueError(f"expected {length} values, found {len(items)}")
    if not items:
        raise _BadValueError("the list is empty; name at least one")
    values = [_convert(hint, item, field) for item in items]
    if field.metadata.get("or_one") and len(set(values)) < len(values):
        raise _BadValueError("a value is given twice")
    return values


def _scalar(kind: type, entry: Entry) -> Any:
    value = entry.value
    if kind is str and entry.text is not None:
        return entry.text
    if kind is float:
        value = exponent_number(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = _float(value)
    if type(value) is not kind:
        remedy = ""
        if kind is str and isinstance(value, (int, float)):
            remedy = "; put it in quotes"
        elif kind is not str and isinstance(value, str) and _reads_as(kind, value):
            remedy = "; remove the quotes"
        raise _BadValueError(f"expected {_EXPECTED[kind]}, found {described(value)}{remedy}")
    if kind is float and not math.isfinite(value):
        raise _BadValueError(f"expected a finite number, found {value}")
    return value


def _float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _BadValueError("expected a finite number, found one with too many digits") from None


def _reads_as(kind: type, text: str) -> bool:
    patterns = {int: r"[-+]?\d+", float: r"[-+]?\d*\.?\d+", bool: r"(?i)true|false"}
    return re.fullmatch(patterns[kind], text) is not None


def _in_range(value: Any, field: dataclasses.Field) -> Any:
    rules = field.metadata
    if isinstance(value, str):
        if "pattern" in rules and not re.fullmatch(rules["pattern"], value):
            raise _BadValueError(f"found {described(value)}, write it like {rules['example']}")
        return value
    if isinstance(value, bool):
        return value
    limits = (
        ("at_least", lambda bound: value >= bound, "at least"),
        ("above", lambda bound: value > bound, "above"),
        ("at_most", lambda bound: value <= bound, "at most"),
        ("below", lambda bound: value < bound, "below"),
    )
    wanted = [f"{words} {rules[name]}" for name, _, words in limits if name in rules]
    if all(holds(rules[name]) for name, holds, _ in limits if name in rules):
        return value
    raise _BadValueError(f"found {value}, must be {' and '.join(wanted)}")
