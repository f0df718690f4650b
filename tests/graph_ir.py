"""Counts the operators of a graph that MindSpore has compiled, from the file that it writes after its frontend."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

# `  %5(CNode_12$x) = PrimFunc_Cast(%3, I64(42)) {...}`
_NODE = re.compile(r"^\s*%\d+\(.*?\) = (?:PrimFunc_)?(\w+)\(")
# Nodes that run nothing on a card: they order others, or take parts of results.
_FREE = frozenset({"Depend", "Load", "MakeTuple", "Return", "TupleGetItem", "UpdateState"})
# The last one is written after all passes that do not depend on the device.
_PATTERN = "**/*_validate_*.ir"


def operators(text: str) -> Counter[str]:
    """Name of an operator -> number of its nodes."""
    found = Counter(match[1] for match in map(_NODE.match, text.splitlines()) if match)
    return Counter({name: count for name, count in found.items() if name not in _FREE})


def compiled_operators(folder: Path) -> Counter[str]:
    """Operators of the last graph in the folder of `save_graphs_path`."""
    return operators(max(folder.glob(_PATTERN), key=lambda path: path.stat().st_mtime_ns).read_text())


def of_a_layer(one: Counter[str], two: Counter[str]) -> dict[str, int]:
    """Operators that a second layer adds; a negative number shows that the counts are not those of equal networks."""
    return {name: two[name] - one[name] for name in sorted(one | two) if two[name] != one[name]}
