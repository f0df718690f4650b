"""`load_settings`: YAML, flags and overrides -> checked `Settings`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.settings.checks import Checker
from glm_ms.settings.convert import Converter
from glm_ms.settings.document import Entry, parse, read_document
from glm_ms.settings.errors import SettingsError
from glm_ms.settings.flags import FLAGS
from glm_ms.settings.legacy.translate import is_legacy, translate
from glm_ms.settings.schema import BATCH_SIZE_KEYS, Settings, batch_size_key
from glm_ms.storage.suggest import did_you_mean

_OVERRIDE = re.compile(r"\s*([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\s*=(.*)", re.DOTALL)


def load_settings(
    path: str | Path,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    check_files: bool = True,
) -> Settings:
    """Reads a YAML file, lays flags and overrides over it, and checks the result.

    Args:
        path: YAML file; of this project, or of MindFormers 1.0 to 1.3 (see `glm_ms.settings.legacy.translate`).
        overrides: `key.sub=value` texts; the value is YAML (`[0.9, 0.95]`, `null`, `{a: 1}`), for keys that
            hold text it is taken as it stands. Of several for one key the last counts.
        flags: names of `glm_ms.settings.FLAGS` -> text as typed, or a plain value; `None` values are skipped.
        check_files: also check that the files and folders the run mode reads are there. Relative paths
            start from the current directory.

    Returns:
        Settings; `notes` tells what was adjusted, for the user to read.

    Raises:
        SettingsError: with every problem found, one a line, each naming its place, key and remedy.
    """
    settings, problems = read_settings(path, overrides, flags, check_files)
    if problems:
        raise SettingsError(problems)
    return settings


def read_settings(
    path: str | Path,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    check_files: bool = True,
) -> tuple[Settings, list[str]]:
    """As `load_settings`, for callers with checks of their own to report in the same breath.

    Returns:
        Settings, not to be used while there are problems; and a message for each problem.

    Raises:
        SettingsError: the file cannot be read as YAML at all, or asks for an export.
    """
    document = read_document(path)
    legacy = is_legacy(document)
    given, problems = _command_line(flags or {}, overrides)
    _lay_over(document, given, problems)
    _add_batch_size(document, flags or {}, given, problems)
    notes: list[str] = []
    converter = Converter()
    if legacy:
        typed = {entry.where for entry in given.values()}
        document, notes, untranslated, converter.unusable = translate(document, str(path), typed)
        problems += untranslated
    settings = converter.section(Settings, document)
    settings.source, settings.origins, settings.notes = str(path), converter.origins, notes
    checker = Checker(settings, converter.unusable)
    checker.check_values()
    if check_files:
        checker.check_files()
    return settings, problems + converter.problems + checker.problems


def _command_line(flags: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Entry], list[str]]:
    """Dotted key -> entry for all flags but --batch_size, then all overrides; and the problems met."""
    given: dict[str, Entry] = {}
    problems: list[str] = []
    by_flag: dict[str, str] = {}
    for name, value in flags.items():
        if name not in FLAGS:
            problems.append(f"command line: --{name}: unknown flag{did_you_mean(name, FLAGS)}")
        elif value is not None and FLAGS[name].key is not None:
            given[FLAGS[name].key] = _flag_entry(name, value)
            by_flag[FLAGS[name].key] = name
    for text in overrides:
        match = _OVERRIDE.fullmatch(text)
        if not match:
            problems.append(f"command line: {text!r}: expected key.sub=value")
            continue
        key, value = match.groups()
        if key in by_flag:
            problems.append(
                f"command line: {key} is given twice, by --{by_flag[key]} and by {text}; remove one"
            )
        given[key] = _typed(value, f"command line ({key}={_short(value)})")
    return given, problems


def _flag_entry(name: str, value: Any) -> Entry:
    where = f"command line (--{name} {_short(str(value))})"
    return _typed(value, where) if isinstance(value, str) else _plain_entry(value, where)


def _plain_entry(value: Any, where: str) -> Entry:
    if isinstance(value, (list, tuple)):
        return Entry([_plain_entry(item, where) for item in value], where, where)
    return Entry(value, where, where)


def _typed(text: str, where: str) -> Entry:
    """An entry of what was typed. Text that is no YAML may still be right for a key that holds text."""
    try:
        entry = parse(text, where, lines=False)
    except SettingsError:
        return Entry(text, where, where, text)
    return Entry(entry.value, where, where, text)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _lay_over(document: Entry, given: Mapping[str, Entry], problems: list[str]) -> None:
    for key, entry in given.items():
        section, names = document, key.split(".")
        for name in names[:-1]:
            inner = section.value.get(name)
            if inner is not None and inner.value is not None and not inner.is_section:
                problems.append(f"{entry.where}: {key}: {name} is not a section")
                break
            # A copy: behind an alias (`eval_dataset: *train_dataset`) two sections share their values.
            inner = dataclasses.replace(
                inner or entry, value=dict(inner.value or {}) if inner else {}, text=None
            )
            section.value[name] = inner
            section = inner
        else:
            _put(section, names[-1], entry)


def _put(section: Entry, name: str, entry: Entry) -> None:
    """Sets a value; a section given as `{a: 1}` changes only the keys it names."""
    old = section.value.get(name)
    if old is not None and old.is_section and entry.is_section:
        merged = section.value[name] = dataclasses.replace(old, value=dict(old.value))
        for inner_name, inner in entry.value.items():
            _put(merged, inner_name, inner)
    else:
        section.value[name] = entry


def _add_batch_size(
    document: Entry, flags: Mapping[str, Any], given: dict[str, Entry], problems: list[str]
) -> None:
    """Lays `--batch_size`, the batch size of whichever run mode was set, over the document and adds it to `given`."""
    value = flags.get("batch_size")
    if value is None:
        return
    mode = document.value.get("run_mode")
    run_mode = Settings.run_mode if mode is None else mode.value
    if not isinstance(run_mode, str) or run_mode not in BATCH_SIZE_KEYS:
        return  # the report on run_mode is enough
    key = batch_size_key(run_mode)
    if key in given:
        problems.append(f"command line: {key} is given twice, by --batch_size and by an override; remove one")
    given[key] = _flag_entry("batch_size", value)
    _lay_over(document, {key: given[key]}, problems)
