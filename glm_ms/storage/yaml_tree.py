"""One reader for YAML: a tree of entries with file and line, no duplicate keys, bounded nesting, plain data only.

Numbers are those of YAML 1.2: `010` and `1:30`, which YAML 1.1 reads as 8 and 90, are text, and so are dates.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from glm_ms.storage.errors import FileError
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import MAX_DEPTH, is_zero, read_text
from glm_ms.storage.suggest import did_you_mean

_CORE = "tag:yaml.org,2002:"
_STR, _INT, _FLOAT, _MERGE = (f"{_CORE}{name}" for name in ("str", "int", "float", "merge"))
_NUMBERS = {
    _INT: r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*|0x[0-9a-fA-F]+|0b[01]+)",
    _FLOAT: r"[-+]?([0-9]+(_[0-9]+)*\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


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

    def plain(self) -> Any:
        """The value without places. What an alias repeats is converted once and shared."""
        return _plain(self, {})


def _plain(entry: Entry, done: dict[int, Any]) -> Any:
    value = entry.value
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {name: _plain(item, done) for name, item in value.items()}
        else:
            done[id(value)] = [_plain(item, done) for item in value]
    return done[id(value)]


def read_yaml(path: str | Path, error: type[FileError] = FileError) -> Entry:
    """The top level of a UTF-8 YAML file. Raises `error` if it is missing, broken or not a mapping."""
    if problem := path_problem(path):
        raise error(problem)
    path = Path(path)
    text = read_text(path, error, f"no such file{did_you_mean(path.name, _siblings(path))}")
    entry = parse_yaml(text, str(path), error, lines=True)
    if entry.value is None:
        raise error(f"{path}: has no settings")
    if not entry.is_section:
        raise error(f"{entry.where}: expected `key: value` lines at the top level")
    return entry


def _siblings(path: Path) -> list[str]:
    try:
        return [item.name for item in path.parent.glob("*.y*ml")]
    except (OSError, ValueError):  # a name that the system cannot look up
        return []


def parse_yaml(text: str, source: str, error: type[FileError] = FileError, lines: bool = False) -> Entry:
    """Parses one YAML document. Errors name `source`, or with `lines` also the line.

    Raises `error` for broken YAML, a duplicate key, a key that is not text, an alias that contains itself, nesting
    deeper than `MAX_DEPTH`, and a tag that is not plain YAML or does not fit its value.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Entry(None, source) if node is None else _Builder(loader, source, error, lines).entry(node)
    except FileError:
        raise
    except yaml.MarkedYAMLError as problem:
        place = f"{source}:{problem.problem_mark.line + 1}" if lines and problem.problem_mark else source
        reason = ", ".join(part for part in (problem.context, problem.problem) if part)
    except (yaml.YAMLError, ValueError) as problem:
        place, reason = source, " ".join(str(problem).split())
    raise error(f"{place}: not valid YAML: {reason}")


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting. The scanner of PyYAML takes quadratic time for it, the composer is recursive."""

    depth = 0
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {
        first: [rule for rule in rules if rule[0].removeprefix(_CORE) in ("bool", "null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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
            raise _problem(f"nested more than {MAX_DEPTH} levels deep", self.get_mark())


for _tag, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_form})$"), list("-+.0123456789"))


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


class _Builder:
    """Converts composed YAML nodes to entries. A node behind an alias is built once and shared."""

    def __init__(self, loader: yaml.SafeLoader, source: str, error: type[FileError], lines: bool) -> None:
        self.loader, self.source, self.error, self.lines = loader, source, error, lines
        self.built: dict[int, Entry | None] = {}

    def entry(self, node: yaml.Node) -> Entry:
        if id(node) not in self.built:
            self.built[id(node)] = None
            self.check_tag(node)
            if isinstance(node, yaml.MappingNode):
                value: Any = self.mapping(node)
            elif isinstance(node, yaml.SequenceNode):
                value = [self.entry(item) for item in node.value]
            else:
                self.check_text(node)
                value = self.loader.construct_object(node)
                if value == 0 and isinstance(value, float) and not is_zero(node.value):
                    raise _problem(f"{node.value} is too small for a number, it would be 0", node.start_mark)
            self.built[id(node)] = Entry(value, self.place(node))
        entry = self.built[id(node)]
        if entry is None:
            raise self.error(f"{self.place(node)}: an alias contains itself")
        return entry

    def check_tag(self, node: yaml.Node) -> None:
        """Refuses a tag other than the one that the node has without it; `!!str` on a scalar and `!!float 1` are right.

        The constructors of PyYAML fail on other tags (`!!int ""`), or change the value (`!!null 5`).
        """
        scalar = isinstance(node, yaml.ScalarNode)
        implied = self.loader.resolve(type(node), node.value if scalar else "", (True, False))
        fits = node.tag == implied or (scalar and node.tag == _STR) or (node.tag, implied) == (_FLOAT, _INT)
        if not fits:
            what = repr(node.value) if scalar else f"a {node.id}"
            tag = node.tag.replace(_CORE, "!!")
            raise _problem(f"no constructor of the tag {tag} for {what}; remove the tag", node.start_mark)

    def check_text(self, node: yaml.ScalarNode) -> None:
        """Refuses half of a surrogate pair, which an escape can name: no file can have it."""
        half = re.search("[\ud800-\udfff]", node.value)
        if half:
            raise _problem(
                f"{half.group()!r} is half of a surrogate pair; remove it, or write the character itself",
                node.start_mark,
            )

    def mapping(self, node: yaml.MappingNode) -> dict[str, Entry]:
        merged: dict[str, Entry] = {}
        own: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged = {**self.merged(value_node), **merged}
                continue
            name, place = self.name(key_node), self.place(key_node)
            if name in own:
                raise self.error(f"{place}: key {name} is given twice, first at {own[name].key_where}; remove one")
            own[name] = dataclasses.replace(self.entry(value_node), key_where=place)
        return {**merged, **own}

    def merged(self, node: yaml.Node) -> dict[str, Entry]:
        """Keys of `<<: *anchor` or `<<: [*a, *b]`; of equal names the first counts."""
        named, result = self.entry(node), dict[str, Entry]()
        for source in named.value if isinstance(named.value, list) else [named]:
            if not source.is_section:
                raise self.error(f"{self.place(node)}: << must name a mapping")
            result = {**source.value, **result}
        return result

    def name(self, node: yaml.Node) -> str:
        name = self.entry(node).value
        if not isinstance(name, str):
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise self.error(f"{self.place(node)}: a key must be a name, found {found}")
        return name

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source
