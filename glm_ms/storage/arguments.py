"""Command lines of the tools."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Flags may not be shortened, and each is given once: argparse itself would drop all values but the last."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        seen: dict[int, str] = {}
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if action is not None and id(action) in seen:
                also = "" if seen[id(action)] == name else f", also as {seen[id(action)]}"
                self.error(f"{name} is given twice{also}; remove one")
            if action is not None:
                seen[id(action)] = name
        return super().parse_known_args(words, namespace)
