"""The state of a translation from MindFormers' names to ours, see `translate`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from glm_ms.settings.document import Entry
from glm_ms.settings.errors import Problem, described


@dataclass(frozen=True)
class Source:
    """A key as it was given.

    Attributes:
        name: as it was written.
        entry: its value.
        typed: whether it comes from the command line.
        key: its name in MindFormers' files, section aliases resolved.
        rank: of several sources of one key of ours, the lowest counts.
    """

    name: str
    entry: Entry
    typed: bool
    key: str = ""
    rank: tuple[int, int] = (0, 0)

    @property
    def value(self) -> Any:
        """The value, with MindFormers' text 'None' as null."""
        return None if self.entry.value == "None" else self.entry.value

    def with_value(self, value: Any) -> Source:
        """The same key with another value."""
        return dataclasses.replace(self, entry=dataclasses.replace(self.entry, value=value, text=None))


@dataclass
class Draft:
    """The state of a translation.

    Attributes:
        source: path of the file.
        found: key in MindFormers' files, aliases resolved -> its source.
        targets: our key -> the sources that may become it.
        chosen: our key -> the source that became it.
        renamed, remarks: lines for the user, about class names and about everything else.
        unused: reason -> keys without effect.
    """

    source: str
    found: dict[str, Source] = field(default_factory=dict)
    targets: dict[str, list[Source]] = field(default_factory=dict)
    chosen: dict[str, Source] = field(default_factory=dict)
    renamed: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def offer(self, key: str, source: Source) -> None:
        """Adds a source of one of our keys."""
        self.targets.setdefault(key, []).append(source)

    def take(self, key: str, name: str) -> Source | None:
        """Removes the source of our `key` that is MindFormers' key `name`; returns it, if there is one."""
        taken = [source for source in self.targets.get(key, ()) if source.key == name]
        self.targets[key] = [source for source in self.targets.get(key, ()) if source.key != name]
        return taken[0] if taken else None

    def given(self, name: str) -> Any:
        """The value of a key in MindFormers' files; None if it is absent."""
        return self.found[name].value if name in self.found else None

    def value(self, key: str, default: Any = None) -> Any:
        """The value of one of our keys, once all are chosen."""
        return self.chosen[key].value if key in self.chosen else default

    def put(self, key: str, value: Any, cause: Source | None = None) -> None:
        """Sets one of our keys to a derived value, whose place is that of `cause`."""
        where = cause.entry.where if cause else self.source
        self.chosen[key] = Source(key, Entry(value, where, where), bool(cause and cause.typed))

    def without_effect(self, source: Source, reason: str) -> None:
        """Notes a key without effect."""
        self.unused.setdefault(reason, []).append(source.name)

    def remark(self, source: Source, text: str) -> None:
        """A line about a key as it was written."""
        self.remarks.append(f"{source.entry.where}: {source.name}: {shown(source)}{text}")

    def refuse(self, source: Source, text: str) -> None:
        """A problem with a key as it was written."""
        self.problems.append(Problem(source.name, f"{shown(source)}: {text}", where=source.entry.where))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; True is not 1, and lists are compared by their elements."""
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other)
        return len(one) == len(other) and all(a is b or a.value == b.value for a, b in pairs)
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(source: Source) -> str:
    """The value of a key, for a line to the user."""
    value = source.value
    if value is None or isinstance(value, (list, dict)):
        return described(value)
    return str(value) if value != "" else '""'
