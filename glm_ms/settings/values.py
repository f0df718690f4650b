"""Entries of a document -> the dataclasses of the schema, by their type hints; every problem is collected."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from glm_ms.settings.errors import Problem, SettingsError, described, joined
from glm_ms.settings.schema import EVAL_STEPS, Settings, allowed, default_of, keys_of, leaf_keys, used_with
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import exponent_number, is_zero
from glm_ms.storage.suggest import did_you_mean, nearest
from glm_ms.storage.yaml_tree import Entry

_EXPECTED = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
# Text that a type other than text would accept without its quotes.
_UNQUOTED = {int: r"[-+]?\d+", float: r"[-+]?\d*\.?\d+", bool: r"(?i)true|false"}
# Of whole numbers; no setting counts further, and sizes that are multiplied stay computable.
_LARGEST = 10**15 - 1
# Longer lists of names are not shown.
_LISTED = 40
# Rule of a key -> its words in an error, and the test.
LIMITS = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


class Converter:
    """Converts a document."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []  # all that were found
        self.notes: list[str] = []  # lines about values without effect
        self.origins: dict[str, str] = {}  # dotted key -> where its value was written

    def settings(self, document: Entry, source: str) -> Settings:
        """The whole document; `source` is its file. Keys whose default depends on others have their values."""
        settings = self.section(Settings, document)
        settings.source, settings.origins, settings.notes = source, self.origins, self.notes
        if settings.do_eval and not {"eval_step_interval", "eval_epoch_interval"} & self.origins.keys():
            settings.eval_step_interval = EVAL_STEPS
        return settings

    def section(self, kind: type, entry: Entry, path: str = "") -> Any:
        """Builds dataclass `kind` from a mapping or null; `path` is the dotted name of the section."""
        fields = {item.name: item for item in keys_of(kind)}
        if not entry.is_section:
            null = entry.value is None or (isinstance(entry.value, str) and is_neutral(entry.value))
            if not null:
                message = f"expected a section with {', '.join(list(fields)[:4])} ..., found {described(entry.value)}"
                self.problems.append(Problem(path, message, where=entry.where))
            return kind()
        values, hints = dict[str, Any](), get_type_hints(kind)
        problems: dict[str, Problem] = {}
        for name, item in entry.value.items():
            dotted = joined(path, name)
            if name not in fields:
                self.problems.append(unknown_key(dotted, dotted, item, fields))
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self.section(hints[name], item, dotted)
            else:
                self.origins[dotted] = item.where
                try:
                    values[name] = _convert(hints[name], item, fields[name])
                except SettingsError as error:
                    problems[name] = Problem(dotted, str(error), where=item.where)
        result = kind(**values)
        greedy = [name for name, item in fields.items() if item.metadata.get("used_with", [""])[0] == "do_sample"]
        for name in greedy if not getattr(result, "do_sample", True) else ():
            problem = problems.pop(name, None)
            if problem or getattr(result, name) != default_of(fields[name]):
                value = described(entry.value[name].value)
                where = self.origins[joined(path, name)]
                self.notes.append(f"{where}: {joined(path, name)}: {value} has no effect with do_sample: False")
        for name, problem in problems.items():
            if not (is_neutral(entry.value[name].value) and _is_unused(fields[name], result)):
                self.problems.append(problem)
        return result


def is_neutral(value: Any) -> bool:
    """Whether a value means "none" in the files of the field: null, False, 0, "", "None"."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "null")
    return value is None or (isinstance(value, (bool, int, float)) and not value)


def _is_unused(field: dataclasses.Field, section: Any) -> bool:
    """Whether another key of the section decides that this one has no effect."""
    if "used_with" not in field.metadata:
        return False
    other, allowed_values = used_with(field)
    return hasattr(section, other) and getattr(section, other) not in allowed_values


def unknown_key(dotted: str, written: str, entry: Entry, siblings: Collection[str]) -> Problem:
    """The problem of a key that does not exist; `written` is its name in the file, `siblings` its section's keys."""
    path, _, name = dotted.rpartition(".")
    hint = did_you_mean(name, siblings)
    if not hint:
        names = [*leaf_keys(), *(item.name for item in keys_of(Settings))]
        elsewhere = list(dict.fromkeys(key for key in names if key.rpartition(".")[2] == name))
        hint = f"; the key is {' or '.join(elsewhere[:3])}" if elsewhere else ""
    if not hint and len(siblings) <= _LISTED:
        hint = f"; known here: {', '.join(siblings)}"
    meant = tuple(joined(path, near) for near in nearest(name, siblings))
    return Problem(written, f"unknown key{hint}", where=entry.key_where or entry.where, meant=meant)


def _convert(hint: Any, entry: Entry, field: dataclasses.Field) -> Any:
    """The value of an entry as `hint` asks. Raises SettingsError, with a message that names no place."""
    if "path" in field.metadata:
        value = entry.value if entry.text is None or entry.value is False else entry.text
        if field.default in ("", False) and is_neutral(value) and (value != "" or hint is str or entry.text is None):
            return field.default
        if isinstance(value, str):
            problem = path_problem(value) if value.strip() else f"empty; give {field.metadata['path']}"
            if problem:
                raise SettingsError(problem)
    elif hint is str and entry.value is None and entry.text is None and field.default == "":
        return ""  # `predict_data:`
    origin = get_origin(hint)
    if origin is Literal:
        return _one_of(get_args(hint), entry)
    if origin is Union:
        return _any_of(get_args(hint), entry, field)
    if origin is list:
        return _list(get_args(hint)[0], entry, field)
    if hint is str and "choices" in field.metadata:
        return _one_of(allowed(field), entry)
    return _in_range(_scalar(hint, entry), field)


def _any_of(hints: tuple[Any, ...], entry: Entry, field: dataclasses.Field) -> Any:
    kinds = [hint for hint in hints if hint is not type(None)]
    number = isinstance(entry.value, (int, float)) and not isinstance(entry.value, bool)
    if type(None) in hints and is_neutral(entry.value) and not (number and {int, float} & set(kinds)):
        return None
    for hint in kinds:
        try:
            return _convert(hint, entry, field)
        except SettingsError:
            if len(kinds) == 1:
                raise
    expected = " or ".join(map(expected_type, kinds))
    raise SettingsError(f"expected {expected}, found {described(entry.value)}")


def expected_type(hint: Any) -> str:
    """A type in words: "a whole number"."""
    if hint in _EXPECTED:
        return _EXPECTED[hint]
    return "a list" if get_origin(hint) is list else " or ".join(map(repr, get_args(hint)))


def _one_of(choices: tuple[Any, ...], entry: Entry) -> Any:
    value = entry.value if entry.text is None or not isinstance(choices[0], str) else entry.text
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    names = [str(choice) for choice in choices]
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise SettingsError(f"found {described(value)}, allowed: {', '.join(names)}{hint}")


def _list(hint: Any, entry: Entry, field: dataclasses.Field) -> list[Any]:
    items, or_one = entry.value, field.metadata.get("or_one")
    if not isinstance(items, list):
        if not or_one or entry.value is None:
            raise SettingsError(f"expected a list, found {described(entry.value)}; write [a, b]")
        items = [entry]
    lengths = field.metadata.get("length", (len(items),))
    if len(items) not in lengths:
        raise SettingsError(f"expected {' or '.join(map(str, lengths))} values, found {len(items)}")
    if not items:
        raise SettingsError("the list is empty; name at least one")
    values = [_convert(hint, item, field) for item in items]
    if or_one and len(set(values)) < len(values):
        raise SettingsError("a value is given twice")
    return values


def _scalar(kind: type, entry: Entry) -> Any:
    value = entry.value
    if kind is str and entry.text is not None:
        return entry.text
    if kind is float:
        value = exponent_number(value)
        if value == 0 and isinstance(entry.value, str) and not is_zero(entry.value):
            raise SettingsError(f"found {entry.value}, which is too small for a number; write 0 for none")
        try:
            value = float(value) if type(value) is int else value
        except OverflowError:
            raise SettingsError("expected a finite number, found one with too many digits") from None
    if type(value) is not kind:
        remedy = ""
        if kind is str and isinstance(value, (int, float)):
            remedy = "; put it in quotes"
        elif kind is not str and isinstance(value, str) and re.fullmatch(_UNQUOTED[kind], value):
            remedy = "; remove the quotes"
        raise SettingsError(f"expected {_EXPECTED[kind]}, found {described(value)}{remedy}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"expected a finite number, found {value}")
    if type(value) is int and abs(value) > _LARGEST:
        raise SettingsError(f"expected a number of at most {len(str(_LARGEST))} digits, found {described(value)}")
    return value


def _in_range(value: Any, field: dataclasses.Field) -> Any:
    rules = field.metadata
    if isinstance(value, str) and "pattern" in rules and not re.fullmatch(rules["pattern"], value):
        raise SettingsError(f"found {described(value)}, write it like {rules['example']}")
    limits = {} if isinstance(value, (str, bool)) else {name: rules[name] for name in LIMITS if name in rules}
    if all(LIMITS[name][1](value, bound) for name, bound in limits.items()):
        return value
    wanted = " and ".join(f"{LIMITS[name][0]} {bound}" for name, bound in limits.items())
    raise SettingsError(f"found {value}, must be {wanted}")
