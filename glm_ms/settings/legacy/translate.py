"""Configurations of MindFormers 1.0 to 1.3 for ChatGLM2 and ChatGLM3, read as they are.

A file counts as one of them by its first sign: a class name that only they know (`ChatGLM2Config`,
`FP32StateAdamWeightDecay` ...) or a section that only they have (`trainer`, `callbacks` ...); and not if it names
one of our classes. In other files the old names stay unknown keys. `legacy_table.LEGACY` says what becomes of each
key; here it is applied to the entries of file and command line, before the schema sees them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from glm_ms.settings.document import Entry
from glm_ms.settings.errors import Problem, SettingsError, described
from glm_ms.settings.legacy.draft import Draft, Source, same, shown
from glm_ms.settings.legacy.rules import AFTER_CHOICE, BEFORE_CHOICE
from glm_ms.settings.legacy.table import (
    CONFIGS,
    LEGACY,
    LEGACY_CLASSES,
    LEGACY_SECTIONS,
    NETWORKS,
    SECTION_ALIASES,
    Rule,
)
from glm_ms.settings.schema import leaf_keys
from glm_ms.settings.values import unknown_key
from glm_ms.storage.suggest import did_you_mean

_OUR_CLASSES = frozenset({"GLMConfig", "GLMForCausalLM", "GLMTrainOneStep", "GLMAdamW"})
_TYPE_KEYS = (
    "model.model_config.type", "model.arch.type", "trainer.type", "runner_wrapper.type", "optimizer.type",
    "train_dataset_task.type", "eval_dataset_task.type",
)  # fmt: skip


class Translation(NamedTuple):
    """A document in our names.

    Attributes:
        document: the top level, to be converted by the schema.
        notes: lines for the user: what the names of the file mean here.
        problems: of keys that cannot be translated.
    """

    document: Entry
    notes: list[str]
    problems: list[Problem]


def is_legacy(document: Entry) -> bool:
    """Whether a file, without the command line, is one of MindFormers'; see the module."""
    types = {value for value in (_at(document, key) for key in _TYPE_KEYS) if isinstance(value, str)}
    if _at(document, "model.arch.type") not in (None, *_OUR_CLASSES):
        types.discard("GLMConfig")  # ChatGLM-6B of MindFormers has a class of that name, and another network
    if types & _OUR_CLASSES:
        return False
    return bool(types & LEGACY_CLASSES or LEGACY_SECTIONS & document.value.keys())


def translate(document: Entry, source: str, typed: Collection[str]) -> Translation:
    """Puts a configuration of MindFormers into our names.

    A key counts, in this order: from the command line, in whichever spelling; from the file, where of several keys
    with one meaning MindFormers' own choice is kept.

    Args:
        document: a file that `is_legacy`, with flags and overrides laid over it.
        source: path of the file.
        typed: `Entry.where` of everything that comes from the command line.

    Raises:
        SettingsError: the file asks for an export, which there is none of, or describes another network.
    """
    _refuse_export(document)
    _refuse_other_networks(document)
    draft = Draft(source)
    spellings = _Gatherer(draft, typed).gather(_with_callbacks(document))
    for name, sources in spellings.items():
        draft.found[name] = _best(sources, name, draft)
    _apply(BEFORE_CHOICE, draft)
    for name, one in draft.found.items():
        _sort(name, one, draft)
    for key, sources in draft.targets.items():
        draft.chosen[key] = _best(sources, key, draft)
    _apply(AFTER_CHOICE, draft)
    notes = [f"{source}: a configuration of MindFormers; what its names mean here:"]
    notes += draft.renamed + _moves(draft) + draft.remarks + _without_effect(draft)
    return Translation(_nested(draft), notes, draft.problems)


def _apply(rules: tuple[Callable[[Draft], None], ...], draft: Draft) -> None:
    for rule in rules:
        rule(draft)


def _entry(document: Entry, dotted: str) -> Entry | None:
    entry: Entry | None = document
    for name in dotted.split("."):
        if entry is None or not entry.is_section:
            return None
        entry = entry.value.get(name)
    return entry


def _at(document: Entry, dotted: str) -> Any:
    entry = _entry(document, dotted)
    return None if entry is None else entry.value


def _refuse_export(document: Entry) -> None:
    run_mode = document.value.get("run_mode")
    if run_mode is None and "infer" in document.value:
        run_mode = dataclasses.replace(document.value["infer"], value="export")
    if run_mode is not None and run_mode.value == "export":
        raise SettingsError(
            f"{run_mode.where}: run_mode: export: MindIR files are not made here. tools/convert_weight.py turns "
            "weights into the format that is wanted; --run_mode predict answers prompts with the keys of this file"
        )


def _refuse_other_networks(document: Entry) -> None:
    """One error in place of one for each key of another model."""
    for key, known in (("model.model_config.type", CONFIGS), ("model.arch.type", NETWORKS)):
        entry = _entry(document, key)
        if entry is not None and isinstance(entry.value, str) and entry.value not in (*known, *_OUR_CLASSES):
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
            raise SettingsError(
                f"{item.where}: callbacks: expected `- type: NAME` with the keys of that callback"
            )
        if kind.value in section:
            raise SettingsError(f"{item.where}: callbacks: {kind.value} is given twice; remove one")
        keys = {name: entry for name, entry in item.value.items() if name != "type"}
        section[kind.value] = dataclasses.replace(item, value=keys)
    sections = {**document.value, "callbacks": dataclasses.replace(callbacks, value=section)}
    return dataclasses.replace(document, value=sections)


class _Gatherer:
    """Walks the document once; what stands in neither table nor schema is a problem."""

    def __init__(self, draft: Draft, typed: Collection[str]) -> None:
        self.draft = draft
        self.typed = typed
        self.known = {*LEGACY, *leaf_keys()}
        self.sections: dict[str, set[str]] = {}
        for key in (*self.known, *SECTION_ALIASES):
            names = key.split(".")
            for depth, name in enumerate(names):
                self.sections.setdefault(".".join(names[:depth]), set()).add(name)
        self.spellings: dict[str, list[Source]] = {}

    def gather(self, document: Entry) -> dict[str, list[Source]]:
        """Key, aliases resolved -> all its spellings."""
        self.walk(document, "", "", 0)
        return self.spellings

    def walk(self, section: Entry, path: str, spelled: str, rank: int) -> None:
        for name, entry in section.value.items():
            dotted, written = _joined(path, name), _joined(spelled, name)
            key = SECTION_ALIASES.get(dotted, dotted)
            inner_rank = rank + (key != dotted)
            if key in self.sections and entry.is_section and entry.value:
                self.walk(entry, key, written, inner_rank)
            elif key in self.known:
                source = Source(written, entry, entry.where in self.typed, inner_rank)
                self.spellings.setdefault(key, []).append(source)
            elif key not in self.sections:
                self.unknown(path, name, written, entry)
            elif entry.value not in (None, "None", {}):
                message = f"expected a section, found {described(entry.value)}"
                self.draft.problems.append(Problem(written, message, where=entry.where))

    def unknown(self, path: str, name: str, written: str, entry: Entry) -> None:
        problem = unknown_key(_joined(path, name), written, entry, sorted(self.sections[path]))
        rules = {near: LEGACY.get(near) for near in problem.meant}
        ours = tuple(rule.key if rule and rule.key else near for near, rule in rules.items())
        self.draft.problems.append(dataclasses.replace(problem, meant=ours))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sort(name: str, source: Source, draft: Draft) -> None:
    """Applies the row of a key, if it has one."""
    rule = LEGACY.get(name)
    if rule is None:
        draft.offer(name, dataclasses.replace(source, rank=0))
    elif rule.key is None:
        _judge_idle(rule, source, draft)
    else:
        value = source.entry.value
        if isinstance(value, str) and value in rule.values:
            ours = rule.values[value]
            place = f"{source.entry.where}: {source.name}"
            draft.renamed.append(
                f"{place}: {value} is {ours} here{f' ({rule.remark})' if rule.remark else ''}"
            )
            source = dataclasses.replace(
                source, entry=dataclasses.replace(source.entry, value=ours, text=None)
            )
        rank = 0 if rule.key == name else rule.rank
        draft.offer(rule.key, dataclasses.replace(source, rank=rank))


def _judge_idle(rule: Rule, source: Source, draft: Draft) -> None:
    value = source.value
    said = [text for known, text in rule.said.items() if same(known, value)]
    if said:
        draft.remark(source, f": {said[0]}")
    elif rule.neutral is None or any(same(known, value) for known in rule.neutral):
        draft.without_effect(source, rule.reason)
    else:
        draft.refuse(source, rule.remedy)


def _best(sources: list[Source], key: str, draft: Draft) -> Source:
    """The source that counts; one that says the same in our name is preferred, for it needs no line."""
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
            draft.remark(other, f" gives way to {best.name}: {shown(best)} ({place})")
    ours = [one for one in typed or sources if one.name == key and same(one.value, best.value)]
    return ours[0] if ours else best


def _moves(draft: Draft) -> list[str]:
    """A line for each pair of sections between which keys move."""
    moves: dict[tuple[str, str], list[tuple[str, Source]]] = {}
    for key, source in draft.chosen.items():
        if source.name != key:
            pair = (source.name.rpartition(".")[0], key.rpartition(".")[0])
            moves.setdefault(pair, []).append((key, source))
    return [_move(*pair, moved) for pair, moved in moves.items()]


def _move(old_section: str, section: str, moved: list[tuple[str, Source]]) -> str:
    key, first = moved[0]
    if len(moved) == 1:
        verb = "are" if " and " in first.name else "is"
        return f"{first.entry.where}: {first.name} {verb} {key} here"
    names = []
    for key, source in moved:
        old, new = source.name.rpartition(".")[2], key.rpartition(".")[2]
        names.append(old if old == new else f"{old} (as {new})")
    return (
        f"{first.entry.where}: {old_section}: {', '.join(names)} belong to {section or 'the top level'} here"
    )


def _without_effect(draft: Draft) -> list[str]:
    """One line with every key that has no effect, by reason."""
    parts = []
    for reason, names in draft.idle.items():
        by_section: dict[str, list[str]] = {}
        for name in names:
            section, _, last = name.rpartition(".")
            by_section.setdefault(section, []).append(last)
        listed = [
            f"{section}.{{{', '.join(last)}}}"
            if len(last) > 1 and section
            else _joined(section, ", ".join(last))
            for section, last in by_section.items()
        ]
        parts.append(f"{', '.join(listed)} ({reason})")
    return [f"{draft.source}: no effect here: {'; '.join(parts)}"] if parts else []


def _nested(draft: Draft) -> Entry:
    root = Entry({}, draft.source)
    for key, source in draft.chosen.items():
        section = root
        *path, last = key.split(".")
        for name in path:
            section = section.value.setdefault(name, Entry({}, source.entry.where, source.entry.where))
        section.value[last] = source.entry
    return root
