"""`SettingsError` and the wording shared by its messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glm_ms.storage.errors import FileError


class SettingsError(FileError):
    """Settings cannot be used. The message lists every problem, one a line, with place, key and remedy.

    Args:
        problems: one message, or a list of them.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


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
