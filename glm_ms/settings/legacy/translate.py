"""Configurations of MindFormers 1.0 to 1.3 for ChatGLM2 and ChatGLM3 in our names.

One sign makes a file one of them: a class name that only they know (`ChatGLM2Config`, `FP32StateAdamWeightDecay` ...),
or a section that only they have (`trainer`, `callbacks` ...), unless it names one of our classes. In other files the
old names are unknown keys. One pass over file and command line applies the rule of `table.LEGACY` to every key; then
`rules` settle keys that act together, and one source is chosen for each of our keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable

from glm_ms.settings.errors import Problem, SettingsError, described, joined
from glm_ms.settings.legacy import table
from glm_ms.settings.legacy.rules import (
    AFTER_CHOICE,
    AFTER_CHOICE_OF_KEYS,
    BEFORE_CHOICE,
    BEFORE_CHOICE_OF_KEYS,
    Draft,
    Source,
    same,
    shown,
)
from glm_ms.settings.schema import leaf_keys
from glm_ms.settings.values import is_neutral, unknown_key
from glm_ms.storage.suggest import did_you_mean
from glm_ms.storage.yaml_tree import Entry

_OUR_CLASSES = frozenset({"GLMConfig", "GLMForCausalLM", "GLMTrainOneStep", "GLMAdamW"})
_TYPE_KEYS = (
    "model.model_config.type", "model.arch.type", "trainer.type", "runner_wrapper.type", "optimizer.type",
    "train_dataset_task.type", "eval_dataset_task.type",
)  # fmt: skip


def is_legacy(document: Entry) -> bool:
    """Whether a file, without the command line, is one of MindFormers'; see the module."""
    values = [_at(document, key).value for key in _TYPE_KEYS]
    types = {value for value in values if isinstance(value, str)}
    if _at(document, "model.arch.type").value not in (None, *_OUR_CLASSES):
        types.discard("GLMConfig")  # ChatGLM-6B of MindFormers has a class of that name, and another network
    if types & _OUR_CLASSES:
        return False
    return bool(types & table.LEGACY_CLASSES or table.LEGACY_SECTIONS & document.value.keys())


def translate(document: Entry, source: str, typed: Collection[str]) -> tuple[Entry, list[str], list[Problem]]:
    """Puts a configuration of MindFormers into our names.

    The command line takes precedence over the file, in either spelling. Of several keys of a file with one meaning
    MindFormers' choice counts.

    Args:
        document: a file that `is_legacy`, with flags and overrides applied.
        source: path of the file.
        typed: `Entry.where` of everything that comes from the command line.

    Returns the document in our names, lines for the user about names and values, and problems. Raises SettingsError for
    a file of tools/export.py without a run mode, or another network.
    """
    _refuse_whole_files(document)
    draft = Draft(source, typed)
    _read(Source("", _with_callbacks(document), False), draft)
    _choose(draft, BEFORE_CHOICE, AFTER_CHOICE)
    return _nested(draft), _notes(draft, "a configuration of MindFormers; what its names mean here:"), draft.problems


def adopt(document: Entry, source: str, typed: Collection[str]) -> tuple[Entry, list[str], list[Problem]]:
    """As `translate`, for one of our files with keys or whole sections of MindFormers, whose meaning they keep.

    Keys of both, and those that nobody knows, stay as they are.
    """
    draft = Draft(source, typed)
    whole = {name: entry for name, entry in document.value.items() if name in table.LEGACY_SECTIONS}
    rest = {name: entry for name, entry in document.value.items() if name not in whole}
    own = _without_foreign(Source("", dataclasses.replace(document, value=rest), False), draft)
    if not whole and not draft.foreign and not draft.problems:
        return document, [], []
    for one in draft.foreign:
        _apply(one, draft)
    _read(Source("", _with_callbacks(dataclasses.replace(document, value=whole)), False), draft)
    _choose(draft, BEFORE_CHOICE_OF_KEYS, AFTER_CHOICE_OF_KEYS)
    for key, chosen in draft.chosen.items():
        if chosen.entry is not _at(own, key):
            _insert(own, key, chosen.entry)
    return own, _notes(draft, "keys of MindFormers; what they mean here:"), draft.problems


def _choose(draft: Draft, before: Iterable[Callable], after: Iterable[Callable]) -> None:
    for combine in before:
        combine(draft)
    for key, sources in draft.targets.items():
        if sources:
            draft.chosen[key] = _best(sources, key, draft)
    for combine in after:
        combine(draft)


def _notes(draft: Draft, what: str) -> list[str]:
    return [f"{draft.source}: {what}", *draft.renamed, *_moves(draft), *draft.remarks, *_without_effect(draft)]


def _without_foreign(section: Source, draft: Draft) -> Entry:
    """A copy of a section without the keys that only MindFormers has; those are added to `draft.foreign`."""
    sections, values = _sections(), dict[str, Entry]()
    for name, entry in section.entry.value.items():
        key = joined(section.key, name)
        one = Source(key, entry, entry.where in draft.typed, key)
        is_ours, is_empty = key in _own_keys(), entry.value == {} or is_neutral(entry.value)
        if key in sections and entry.is_section and not is_empty:
            inner = _without_foreign(one, draft)
            if is_ours:
                values[name] = inner
        elif key in leaf_keys():
            draft.found[key] = one
            draft.targets[key].append(one)
            values[name] = entry
        elif key in table.LEGACY and not (is_ours and is_empty):
            draft.foreign.append(one)
        elif section.key not in _own_keys():
            draft.problems.append(unknown_key(key, key, entry, sorted(sections[section.key])))
        elif key not in sections or is_ours:
            values[name] = entry
    return dataclasses.replace(section.entry, value=values)


@functools.cache
def _own_keys() -> set[str]:
    """Our keys and sections; "" is the top level."""
    keys = {""}
    for key in leaf_keys():
        while key:
            keys.add(key)
            key = key.rpartition(".")[0]
    return keys


def _at(document: Entry, dotted: str) -> Entry:
    """The entry of a key; null if it is absent."""
    for name in dotted.split("."):
        document = (document.value.get(name) if document.is_section else None) or Entry(None, "")
    return document


def _refuse_whole_files(document: Entry) -> None:
    """Raises one error for a file of MindFormers' tools/export.py or for another network, in place of one for each of
    its keys."""
    infer = document.value.get("infer")
    if infer is not None and document.value.get("run_mode") is None:
        raise SettingsError(
            f"{infer.where}: infer: a file for an export, without a run_mode; add --run_mode export, or --run_mode "
            "predict, which answers prompts with the keys of this file"
        )
    for key, known in (("model.model_config.type", table.CONFIGS), ("model.arch.type", table.NETWORKS)):
        entry = _at(document, key)
        if isinstance(entry.value, str) and entry.value not in (*known, *_OUR_CLASSES):
            raise SettingsError(
                f"{entry.where}: {key}: {entry.value}: another network; ChatGLM2 and ChatGLM3 of MindFormers have "
                f"{' or '.join(known)}{did_you_mean(entry.value, known)}"
            )


def _with_callbacks(document: Entry) -> Entry:
    """`callbacks` as a section: name of the callback -> its keys."""
    callbacks = document.value.get("callbacks")
    if callbacks is None or not isinstance(callbacks.value, list):
        return document
    section: dict[str, Entry] = {}
    for item in callbacks.value:
        kind = item.value.get("type") if item.is_section else None
        if kind is None or not isinstance(kind.value, str):
            raise SettingsError(f"{item.where}: callbacks: expected `- type: NAME` with the keys of that callback")
        if kind.value in section:
            raise SettingsError(f"{item.where}: callbacks: {kind.value} is given twice; remove one")
        keys = {name: entry for name, entry in item.value.items() if name != "type"}
        section[kind.value] = dataclasses.replace(item, value=keys)
    sections = {**document.value, "callbacks": dataclasses.replace(callbacks, value=section)}
    return dataclasses.replace(document, value=sections)


@functools.cache
def _sections() -> dict[str, set[str]]:
    """Section of our or of MindFormers' files -> names in it."""
    sections: dict[str, set[str]] = {}
    for key in (*table.LEGACY, *leaf_keys(), *table.SECTION_ALIASES):
        while key:
            section, _, name = key.rpartition(".")
            sections.setdefault(section, set()).add(name)
            key = section
    return sections


def _read(section: Source, draft: Draft) -> None:
    """Applies the rule of every key of a section and of the sections in it."""
    sections = _sections()
    for name, entry in section.entry.value.items():
        dotted, written = joined(section.key, name), joined(section.name, name)
        key = table.SECTION_ALIASES.get(dotted, dotted)
        rank = section.rank[1] + (key != dotted)
        source = Source(written, entry, entry.where in draft.typed, key, (0, rank))
        if key in sections and entry.is_section and entry.value:
            _read(source, draft)
        elif key in table.LEGACY or key in leaf_keys():
            _apply(source, draft)
        elif key not in sections:
            problem = unknown_key(dotted, written, entry, sorted(sections[section.key]))
            rules = [(near, table.LEGACY.get(near)) for near in problem.meant]
            meant = tuple(rule.key if isinstance(rule, table.Renamed) else near for near, rule in rules)
            draft.problems.append(dataclasses.replace(problem, meant=meant))
        elif entry.value not in (None, {}) and not (isinstance(entry.value, str) and is_neutral(entry.value)):
            message = f"expected a section, found {described(entry.value)}"
            draft.problems.append(Problem(written, message, where=entry.where))


def _apply(source: Source, draft: Draft) -> None:
    """Applies the rule of a key."""
    known, rule = draft.found.get(source.key), table.LEGACY.get(source.key)
    if known is not None and same(known.value, source.value) and known.typed >= source.typed:
        return  # the same section again, behind an alias
    if known is None or source.typed > known.typed:
        draft.found[source.key] = source
    if rule is None:
        draft.targets[source.key].append(source)
    elif isinstance(rule, table.Renamed):
        value = source.entry.value
        if isinstance(value, str) and value in rule.values:
            remark = f" ({rule.remark})" if rule.remark else ""
            draft.renamed.append(f"{source.entry.where}: {source.name}: {value} is {rule.values[value]} here{remark}")
            source = source.with_value(rule.values[value])
        rank = 0 if rule.key == source.key else rule.rank
        draft.targets[rule.key].append(dataclasses.replace(source, rank=(rank, source.rank[1])))
    elif (
        isinstance(rule, table.Ignored)
        or is_neutral(source.value)
        or any(same(value, source.value) for value in rule.unless)
    ):
        draft.without_effect(source, rule.reason)
    elif any(same(value, source.value) for value in rule.accepted):
        draft.remark(source, f": {rule.accepted[source.value]}")
    else:
        draft.refuse(source, rule.remedy)


def _best(sources: list[Source], key: str, draft: Draft) -> Source:
    """The source that counts; of equal ones that in our name, which needs no line."""
    typed = [source for source in sources if source.typed]
    best = min(typed or sources, key=lambda source: source.rank)
    for other in typed or sources:
        if other is best or same(other.value, best.value):
            continue
        if typed:
            message = f"{other.name} and {best.name} both mean {key}; keep one of them"
            draft.problems.append(Problem("", message, where=other.entry.where))
        else:
            place = best.entry.where.replace(f"{draft.source}:", "line ")
            draft.remark(other, f" is overridden by {best.name}: {shown(best)} ({place})")
    ours = [one for one in typed or sources if one.name == key and same(one.value, best.value)]
    return ours[0] if ours else best


def _moves(draft: Draft) -> list[str]:
    """A line for each pair of sections between which keys move."""
    moves: dict[tuple[str, str], list[tuple[str, Source]]] = {}
    for key, source in draft.chosen.items():
        if source.name != key:
            pair = (source.name.rpartition(".")[0], key.rpartition(".")[0])
            moves.setdefault(pair, []).append((key, source))
    lines = []
    for (old_section, section), moved in moves.items():
        key, first = moved[0]
        if len(moved) == 1:
            text = f"{first.name} {'are' if ' and ' in first.name else 'is'} {key} here"
        else:
            pairs = [(source.name.rpartition(".")[2], key.rpartition(".")[2]) for key, source in moved]
            names = ", ".join(old if old == new else f"{old} (as {new})" for old, new in pairs)
            text = f"{old_section}: {names} belong to {section or 'the top level'} here"
        lines.append(f"{first.entry.where}: {text}")
    return lines


def _without_effect(draft: Draft) -> list[str]:
    """One line with every key that has no effect, by reason."""
    parts = []
    for reason, names in draft.unused.items():
        by_section: dict[str, list[str]] = {}
        for name in names:
            section, _, last = name.rpartition(".")
            by_section.setdefault(section, []).append(last)
        listed = []
        for section, inside in by_section.items():
            together = f"{{{', '.join(inside)}}}" if len(inside) > 1 and section else ", ".join(inside)
            listed.append(joined(section, together))
        parts.append(f"{', '.join(listed)} ({reason})")
    return [f"{draft.source}: no effect here: {'; '.join(parts)}"] if parts else []


def _nested(draft: Draft) -> Entry:
    root = Entry({}, draft.source)
    for key, source in draft.chosen.items():
        _insert(root, key, source.entry)
    return root


def _insert(section: Entry, key: str, entry: Entry) -> None:
    """Sets a dotted key, unless a value is in the place of one of its sections, which has its own problem."""
    *path, last = key.split(".")
    for name in path:
        inner = section.value.get(name)
        if inner is None or inner.value is None:
            inner = section.value[name] = Entry({}, entry.where, entry.where)
        if not inner.is_section:
            return
        section = inner
    section.value[last] = entry
