"""Command lines of the tools."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from glm_ms import spelling


class Parser(argparse.ArgumentParser):
    """Flags may not be shortened, and each is given once: argparse itself would drop all values but the last.

    An empty value is refused: a path would mean the current folder, which an unset variable of a shell should not.
    Messages of the program name these flags, see `glm_ms.spelling`.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for word in words:  # of a call in Python: the system passes no such words
            if not isinstance(word, str) or "\0" in word:
                self.error(f"{word!r:.60}: an argument must be text without NUL characters")
        seen: dict[int, str] = {}
        name = ""
        for word in words[: words.index("--")] if "--" in words else words:
            before, (name, equals, value) = name, word.partition("=")
            action = self._option_string_actions.get(name)
            if not word or (action is not None and equals and not value):
                what = name or (before if before in self._option_string_actions else "an argument")
                self.error(f"{what}: empty; give a value (is a variable of the shell not set?)")
            if action is not None and id(action) in seen:
                also = "" if seen[id(action)] == name else f", also as {seen[id(action)]}"
                self.error(f"{name} is given twice{also}; remove one")
            if action is not None:
                seen[id(action)] = name
        known = (action for action in self._actions if action.option_strings)
        spelling.register_flags({action.dest: action.option_strings[-1] for action in known})
        return super().parse_known_args(words, namespace)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) <= 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r:.60}: must be a whole number from {least} to {most}")
        return int(text)

    return number
