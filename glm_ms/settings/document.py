"""YAML text -> a tree of entries with file and line, for errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glm_ms.settings.errors import SettingsError
from glm_ms.storage.readers import MAX_DEPTH, read_text
from glm_ms.storage.suggest import did_you_mean

MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass
class Entry:
    """A value and where it was written."""

    value: Any  # a scalar, a list of entries, or a dict of name -> entry
    where: str  # place of the value, for errors: `configs/x.yaml:12`
    key_where: str = ""  # place of its key
    # As typed on the command line, else None. Keys whose value is text take it literally: no quotes for `#` and `:`.
    text: str | None = None

    @property
    def is_section(self) -> bool:
        return isinstance(self.value, dict)


def read_document(path: str | Path) -> Entry:
    """The top level of a UTF-8 YAML file. Raises SettingsError if it is missing, broken or not a mapping."""
    path = Path(path)
    siblings = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    text = read_text(path, SettingsError, f"no such file{did_you_mean(path.name, siblings)}")
    entry = parse(text, str(path), lines=True)
    if entry.value is None:
        raise SettingsError(f"{path}: has no settings")
    if not entry.is_section:
        raise SettingsError(f"{entry.where}: expected `key: value` lines at the top level")
    return entry


def parse(text: str, source: str, lines: bool) -> Entry:
    """Parses one YAML document. Errors name `source`, or with `lines` also the line.

    Raises SettingsError for broken YAML, a duplicate key, a key that is not text, an alias that contains itself, a tag
    that is not plain YAML.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Entry(None, source) if node is None else _Builder(loader, source, lines).entry(node)
    except SettingsError:
        raise
    except yaml.MarkedYAMLError as error:
        place = f"{source}:{error.problem_mark.line + 1}" if lines and error.problem_mark else source
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, ValueError) as error:
        place, reason = source, " ".join(str(error).split())
    raise SettingsError(f"{place}: not valid YAML: {reason}")


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting. The scanner of PyYAML takes quadratic time for it, the composer is recursive."""

    depth = 0

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        super().fetch_flow_collection_start(token)
        self._check(self.flow_level)

    def compose_sequence_node(self, anchor: str | None) -> yaml.Node:
        return self._nested(super().compose_sequence_node, anchor)

    def compose_mapping_node(self, anchor: str | None) -> yaml.Node:
        return self._nested(super().compose_mapping_node, anchor)

    def _nested(self, compose: Callable[[str | None], yaml.Node], anchor: str | None) -> yaml.Node:
        self.depth += 1
        self._check(self.depth)
        node = compose(anchor)
        self.depth -= 1
        return node

    def _check(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=self.get_mark()
            )


class _Builder:
    """Converts composed YAML nodes to entries. A node behind an alias is built once and shared."""

    def __init__(self, loader: yaml.SafeLoader, source: str, lines: bool) -> None:
        self.loader, self.source, self.lines = loader, source, lines
        self.built: dict[int, Entry | None] = {}

    def entry(self, node: yaml.Node) -> Entry:
        if id(node) not in self.built:
            self.built[id(node)] = None
            if isinstance(node, yaml.MappingNode):
                value: Any = self.mapping(node)
            elif isinstance(node, yaml.SequenceNode):
                value = [self.entry(item) for item in node.value]
            else:
                value = self.loader.construct_object(node)
            self.built[id(node)] = Entry(value, self.place(node))
        entry = self.built[id(node)]
        if entry is None:
            raise SettingsError(f"{self.place(node)}: an alias contains itself")
        return entry

    def mapping(self, node: yaml.MappingNode) -> dict[str, Entry]:
        merged: dict[str, Entry] = {}
        own: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE_TAG:
                merged = {**self.merged(value_node), **merged}
                continue
            name, place = self.name(key_node), self.place(key_node)
            if name in own:
                raise SettingsError(f"{place}: key {name} is given twice, first at {own[name].key_where}; remove one")
            own[name] = dataclasses.replace(self.entry(value_node), key_where=place)
        return {**merged, **own}

    def merged(self, node: yaml.Node) -> dict[str, Entry]:
        """Keys of `<<: *anchor` or `<<: [*a, *b]`; of equal names the first counts."""
        named, result = self.entry(node), dict[str, Entry]()
        for source in named.value if isinstance(named.value, list) else [named]:
            if not source.is_section:
                raise SettingsError(f"{self.place(node)}: << must name a mapping")
            result = {**source.value, **result}
        return result

    def name(self, node: yaml.Node) -> str:
        name = self.loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise SettingsError(f"{self.place(node)}: a key must be a name, found {node.value!r}")
        return name

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source
