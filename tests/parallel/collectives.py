"""What a compiled graph sends: MindSpore's text of it -> bytes."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

_ITEM_BYTES = {"Float32": 4, "Float16": 2, "BFloat16": 2, "Int32": 4, "Bool": 1}
_CALL = re.compile(r"= (?:PrimFunc_)?(AllReduce|AllGather|ReduceScatter)\(")
_TENSOR = re.compile(r"Tensor\[(\w+)\]\]?, \(([\d, ]*)\)")
_RANKS = re.compile(r"group_rank_ids: \(([\d, ]+)\)")
# Of a ring of n cards: bytes that each sends, by the larger of what goes in and comes out.
_SHARES = {
    "AllReduce": lambda n: 2 * (n - 1) / n,
    "AllGather": lambda n: (n - 1) / n,
    "ReduceScatter": lambda n: (n - 1) / n,
}


def sent_bytes(folder: Path, world: int) -> dict[str, float]:
    """Kind of collective -> bytes that a card sends in one run of its graph, after the last optimization.

    Args:
        folder: where MindSpore saved its graphs.
        world: cards of the group of all.
    """
    lines = _graph(folder, r"\d+_optimize_\d+\.ir").splitlines()
    total: dict[str, float] = defaultdict(float)
    for line, types in zip(lines, lines[1:]):
        call = _CALL.search(line)
        if call is None:
            continue
        kind, ranks = call.group(1), _RANKS.search(line)
        number = len(ranks.group(1).split(",")) if ranks else world
        sizes = [
            _ITEM_BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n.strip())
            for dtype, shape in _TENSOR.findall(types)
        ]
        total[kind] += max(sizes) * _SHARES[kind](number)
    return dict(total)


def loss_divisors(folder: Path) -> set[int]:
    """By what the compiler divides the derivative of the loss."""
    text = _graph(folder, r"step_parallel_end_\d+\.ir")
    return {int(number) for number in re.findall(r"= _VirtualDiv\(.*?divisor: I64\((\d+)\)", text)}


def _graph(folder: Path, pattern: str) -> str:
    (file,) = (file for file in folder.rglob("*.ir") if re.fullmatch(pattern, file.name))
    return file.read_text(encoding="utf-8")
