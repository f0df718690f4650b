"""`Problem`, `SettingsError` and the wording that messages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glm_ms.storage.errors import FileError


@dataclass(frozen=True)
class Problem:
    """Why settings cannot be used."""

    key: str  # dotted; empty if it concerns none
    message: str  # what is wrong, and the remedy
    depends_on: tuple[str, ...] = ()  # if one of these keys has a problem too, this one is not reported
    where: str = ""  # place of the value, such as `configs/x.yaml:12`
    meant: tuple[str, ...] = ()  # keys that the user probably meant to set, and which therefore are not checked

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class SettingsError(FileError):
    """Settings cannot be used. The message lists every problem, one per line, with place, key and remedy."""

    def __init__(self, problems: str | Problem | Sequence[str | Problem]) -> None:
        """A text is a problem that names its place and key itself."""
        given = [problems] if isinstance(problems, (str, Problem)) else problems
        self.problems = [Problem("", one) if isinstance(one, str) else one for one in given]
        super().__init__("\n".join(map(str, self.problems)))


def independent(problems: Iterable[Problem], reported: Iterable[Problem]) -> list[Problem]:
    """Those `problems` that do not follow from problems that are reported already."""
    bad = {key for problem in reported for key in (problem.key, *problem.meant) if key}

    def follows(problem: Problem) -> bool:
        keys = (problem.key, *problem.depends_on)
        return any(key == other or key.startswith(f"{other}.") for key in keys for other in bad)

    return [problem for problem in problems if not follows(problem)]


def joined(section: str, name: str) -> str:
    """The dotted name of a key; `section` is "" for the top level."""
    return f"{section}.{name}" if section else name


def described(value: Any) -> str:
    """A value with its type, as in YAML: `'two' (str)`."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
