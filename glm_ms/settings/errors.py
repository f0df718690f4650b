"""`SettingsError` and the wording shared by its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SettingsError(ValueError):
    """Settings cannot be used. The message lists every problem, one a line, with place, key and remedy.

    Args:
        problems: one message, or a list of them.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Near misses of `name` among `known`, the nearest first; case does not count."""
    spelled = {item.lower(): item for item in known}
    name = name.lower()
    near = difflib.get_close_matches(name, list(spelled), n=2, cutoff=0.7)
    if not near and len(name) >= 3:
        near = [
            item for item in spelled if len(item) >= 3 and (item.startswith(name) or name.startswith(item))
        ]
    return [spelled[item] for item in near[:2]]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The ending "; did you mean a or b?" where `known` has near misses of `name`, else an empty string."""
    near = nearest(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def described(value: Any) -> str:
    """A value with its type, in the words of YAML: `'two' (str)`."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
