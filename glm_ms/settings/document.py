"""YAML text -> a tree of entries with file and line, for errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glm_ms.settings.errors import SettingsError
from glm_ms.storage.readers import read_text
from glm_ms.storage.suggest import did_you_mean

MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass
class Entry:
    """A value and where it was written.

    Attributes:
        value: a scalar, a list of entries, or a dict of name -> entry.
        where: place of the value, for errors: `configs/x.yaml:12`.
        key_where: place of its key.
        text: the text on the command line; None for values of a file. Keys whose value is text take it literally:
            `#`, `:` and numbers need no quotes there.
    """

    value: Any
    where: str
    key_where: str = ""
    text: str | None = None

    @property
    def is_section(self) -> bool:
        return isinstance(self.value, dict)


def read_document(path: str | Path) -> Entry:
    """The top level of a UTF-8 YAML file, which must be a mapping.

    Raises:
        SettingsError: missing or unreadable file, broken YAML, a duplicate key, a key that is not text,
            an alias that contains itself, a tag that is not plain YAML.
    """
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
    """Parses one YAML document. Errors, see `read_document`, name `source`, or `source:line` with `lines`."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return Entry(None, source) if node is None else _Builder(loader, source, lines).entry(node)
    except yaml.MarkedYAMLError as error:
        place = f"{source}:{error.problem_mark.line + 1}" if lines and error.problem_mark else source
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    except SettingsError:
        raise
    except RecursionError:
        place, reason = source, "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        place, reason = source, " ".join(str(error).split())
    finally:
        if loader is not None:
            loader.dispose()
    raise SettingsError(f"{place}: not valid YAML: {reason}")


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
        merges = [self.merged(value) for key, value in node.value if key.tag == MERGE_TAG]
        result = {name: entry for merged in reversed(merges) for name, entry in merged.items()}
        own: dict[str, str] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            name, place = self.name(key_node), self.place(key_node)
            if name in own:
                raise SettingsError(f"{place}: key {name} is given twice, first at {own[name]}; remove one")
            own[name] = place
            value = self.entry(value_node)
            result[name] = Entry(value.value, value.where, place)
        return result

    def merged(self, node: yaml.Node) -> dict[str, Entry]:
        """Keys of `<<: *anchor` or `<<: [*a, *b]`; of equal names the first counts."""
        sources = self.entry(node)
        result: dict[str, Entry] = {}
        for source in sources.value if isinstance(sources.value, list) else [sources]:
            if not source.is_section:
                raise SettingsError(f"{self.place(node)}: << must name a mapping")
            for name, entry in source.value.items():
                result.setdefault(name, entry)
        return result

    def name(self, node: yaml.Node) -> str:
        name = self.loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise SettingsError(f"{self.place(node)}: a key must be a name, found {node.value!r}")
        return name

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source
