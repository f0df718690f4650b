"""`load_settings`: YAML, flags and overrides -> checked `Settings`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.settings.checks import check, placed, settle
from glm_ms.settings.data_checks import length_problems, loader_problems, record_problems, vocab_file_problems
from glm_ms.settings.errors import Problem, SettingsError, independent
from glm_ms.settings.legacy.translate import adopt, is_legacy, translate
from glm_ms.settings.schema import BATCH_SIZE_KEYS, FLAGS, Settings, leaf_keys
from glm_ms.settings.values import Converter
from glm_ms.storage.suggest import did_you_mean
from glm_ms.storage.yaml_tree import Entry, parse_yaml, read_yaml

_OVERRIDE = re.compile(r"\s*([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\s*=(.*)", re.DOTALL)


def load_settings(
    path: str | Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None, check_files: bool = True
) -> Settings:
    """Reads a YAML file, applies flags and overrides, and checks the result. `notes` tells what was adjusted.

    Args:
        path: YAML file; of this project, or of MindFormers 1.0 to 1.3 (see `glm_ms.settings.legacy.translate`).
        overrides: `key.sub=value` texts; the value is YAML (`[0.9, 0.95]`, `null`, `{a: 1}`), or, for keys whose
            value is text, the text itself. Of several for one key the last counts.
        flags: names of `glm_ms.settings.FLAGS` -> text as typed, or a plain value; `None` values are skipped.
        check_files: also check that the files and folders that the run mode reads exist.

    Raises:
        SettingsError: with every problem found, one per line, each with its place, key and remedy.
    """
    settings, problems = read_settings(path, overrides, flags, check_files)
    if problems:
        raise SettingsError(problems)
    return settings


def read_settings(
    path: str | Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None, check_files: bool = True
) -> tuple[Settings, list[Problem]]:
    """As `load_settings`, but returns the problems, for callers with further checks.

    Raises SettingsError only for a file that cannot be read as YAML, has no run mode beside `infer`, or is for another
    network.
    """
    settings, problems = _converted(path, overrides, flags or {})
    return settings, problems + check(settings, problems, check_files)


def unchecked_settings(path: str | Path) -> Settings:
    """The settings of a YAML file, of this project or of MindFormers, not checked for completeness.

    Raises SettingsError for a file that cannot be read, unknown keys and invalid values.
    """
    settings, problems = _converted(path, (), {})
    if problems:
        raise SettingsError(problems)
    return settings


def load_data_settings(
    path: str | Path, overrides: Sequence[str], flags: Mapping[str, Any], part: str | None = None
) -> tuple[Settings, str, list[str]]:
    """As `load_settings`, for tools that only read a data set: only its keys and files are checked.

    `part` is "train" or "eval"; None: the one that the run mode reads. Returns settings, the part, and a line for each
    length that does not fit the network or the generation.
    """
    settings, problems = _converted(path, overrides, flags)
    settle(settings)
    part = part or ("eval" if settings.run_mode == "eval" else "train")
    found = [*loader_problems(settings, part), *vocab_file_problems(settings), *record_problems(settings, part)]
    problems += placed(settings, independent(found, problems))
    if problems:
        raise SettingsError(problems)
    return settings, part, [f"{one.key}: {one.message}" for one in length_problems(settings, part)]


def _converted(path: str | Path, overrides: Sequence[str], flags: Mapping[str, Any]) -> tuple[Settings, list[Problem]]:
    """Settings before the checks, and the problems of single keys."""
    document = read_yaml(path, SettingsError)
    in_our_names = translate if is_legacy(document) else adopt
    given, problems = _command_line(flags, overrides, document)
    problems += _apply(document, given)
    document, notes, untranslated = in_our_names(document, str(path), {entry.where for entry in given.values()})
    problems += untranslated
    converter = Converter()
    settings = converter.settings(document, str(path))
    settings.notes = notes + settings.notes
    return settings, problems + converter.problems


def _command_line(
    flags: Mapping[str, Any], overrides: Sequence[str], document: Entry
) -> tuple[dict[str, Entry], list[Problem]]:
    """Dotted key -> entry of flags, overrides, and --batch_size, whose key depends on the run mode; and problems."""
    given: dict[str, Entry] = {}
    messages: list[str] = []
    by_flag: dict[str, str] = {}
    for name, value in flags.items():
        if name not in FLAGS:
            messages.append(f"--{name}: unknown flag{did_you_mean(name, FLAGS)}")
        elif value is not None and (key := FLAGS[name].key):
            given[key], by_flag[key] = _flag_entry(name, value), name
    for text in overrides:
        found = _override(text)
        if found is None:
            messages.append(f"{text!r}: expected key.sub=value")
        for key, entry in (found or {}).items():
            if key in by_flag:
                messages.append(f"{key} is given twice, by --{by_flag[key]} and by {text}; remove one")
            given[key] = entry
    mode = given.get("run_mode") or document.value.get("run_mode") or Entry(Settings.run_mode, "")
    batch_key = BATCH_SIZE_KEYS.get(mode.value) if isinstance(mode.value, str) else None
    if flags.get("batch_size") is not None and batch_key:  # a wrong run_mode has its own problem
        if batch_key in given:
            messages.append(f"{batch_key} is given twice, by --batch_size and by an override; remove one")
        given[batch_key] = _flag_entry("batch_size", flags["batch_size"])
    return given, [Problem("", message, where="command line") for message in messages]


def repeated(overrides: Iterable[str]) -> list[str]:
    """Messages about keys that several `key.sub=value` texts of a command line set."""
    messages, first = list[str](), dict[str, str]()
    for text in overrides:
        for key in _override(text) or ():
            if key in first:
                both = f"by {_short(first[key], 80)} and by {_short(text, 80)}"
                messages.append(f"{key} is given twice, {both}; remove one")
            first.setdefault(key, text)
    return messages


def _override(text: str) -> dict[str, Entry] | None:
    """The keys that `key.sub=value` sets, several for `key={a: 1, b: 2}`; None for another form."""
    match = _OVERRIDE.fullmatch(text)
    if not match:
        return None
    key, value = match.groups()
    return _leaves(key, _typed(value, f"command line ({key}={_short(value)})"))


def _leaves(key: str, entry: Entry) -> dict[str, Entry]:
    if not entry.is_section or not entry.value or key in leaf_keys():
        return {key: entry}
    inner = [_leaves(f"{key}.{name}", item) for name, item in entry.value.items()]
    return {name: item for leaves in inner for name, item in leaves.items()}


def _flag_entry(name: str, value: Any) -> Entry:
    where = f"command line (--{name} {_short(str(value))})"
    return _typed(value, where) if isinstance(value, str) else Entry(value, where, where)


def _typed(text: str, where: str) -> Entry:
    """An entry of what was typed. Text that is not valid YAML may still be right for a key whose value is text."""
    try:
        return Entry(parse_yaml(text, where, SettingsError).value, where, where, text)
    except SettingsError:
        return Entry(text, where, where, text)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _apply(document: Entry, given: Mapping[str, Entry]) -> list[Problem]:
    """Sets the given keys in a document."""
    problems = []
    for key, entry in given.items():
        section, names = document, key.split(".")
        for name in names[:-1]:
            inner = section.value.get(name)
            if inner is not None and inner.value is not None and not inner.is_section:
                problems.append(Problem(key, f"{name} is not a section", where=entry.where))
                break
            # A copy: behind an alias (`eval_dataset: *train_dataset`) two sections share their values.
            values = dict(inner.value or {}) if inner else {}
            section.value[name] = dataclasses.replace(inner or entry, value=values, text=None)
            section = section.value[name]
        else:
            known = section.value.get(names[-1])
            if entry.value != {} or known is None or not known.is_section:  # `section={}` changes nothing
                section.value[names[-1]] = entry
    return problems
