"""Operators by device: the portable cell defines each one, a fused kernel of a device computes the same faster.

To add a kernel, write its cell in a file of its own and enter it in `OPERATORS`: `fuse_kernels` then uses it and
`glm_ms.selfcheck` compares it with the portable cell.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import mindspore as ms
from mindspore import nn

from glm_ms.ops import ascend
from glm_ms.ops.portable import ApplyRotary, CachedAttention, GroupedAttention, RMSNormalize

PORTABLE = "portable"

# (operator, device) -> class of the cell. A fused one takes the inputs of the portable one and gives its result but for
# rounding. `replacing(cell, dtype)` returns the one for a portable cell and its compute type, or why there is none.
OPERATORS: dict[tuple[str, str], Any] = {
    ("RMS norm", PORTABLE): RMSNormalize,
    ("RMS norm", "Ascend"): ascend.FusedRMSNormalize,
    ("rotary embedding", PORTABLE): ApplyRotary,
    ("rotary embedding", "Ascend"): ascend.FusedRotary,
    ("attention", PORTABLE): GroupedAttention,
    ("attention", "Ascend"): ascend.FlashAttention,
    ("cached attention", PORTABLE): CachedAttention,
    ("cached attention", "Ascend"): ascend.PagedFlashAttention,
}


def device() -> str:
    """Device of the current context."""
    return ms.get_context("device_target")


def operators_of(name: str) -> dict[str, Any]:
    """Operator -> class, of one device or PORTABLE."""
    return {operator: cell for (operator, place), cell in OPERATORS.items() if place == name}


def why_portable() -> str | None:
    """Why the current device runs portable operators; None if it has fused kernels."""
    name = device()
    if not operators_of(name):
        others = sorted({place for _, place in OPERATORS} - {PORTABLE})
        return f"the device is {name}, the fused kernels are for {', '.join(others)}"
    return ascend.why_not_fused() if name == "Ascend" else None


def fuse_kernels(network: nn.Cell, compute_dtype: ms.Type) -> list[str]:
    """Replaces every portable operator in a network by its fused kernel, if device and sizes allow it.

    Parameters, their names and the results (but for rounding) stay as they are. Call it before the network is
    compiled. Strategies of `glm_ms.parallel` are for portable operators: do not fuse a sharded network.

    Returns:
        Lines for the user: what was replaced, and what was not and why.
    """
    reason = why_portable()
    if reason is not None:
        return [f"portable operators: {reason}"]
    kernels = operators_of(device())
    operators = {cell: name for name, cell in operators_of(PORTABLE).items() if name in kernels}
    fused: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for _, parent in list(network.cells_and_names()):
        for place, cell in parent.name_cells().items():
            operator = operators.get(type(cell))
            if operator is None:
                continue
            kernel = kernels[operator].replacing(cell, compute_dtype)
            if isinstance(kernel, str):
                kept[operator, kernel] += 1
            else:
                setattr(parent, place, kernel)
                fused[operator] += 1
    lines = [f"{operator}: fused kernel in {_cells(count)}" for operator, count in sorted(fused.items())]
    lines += [
        f"{operator}: portable operator in {_cells(count)} ({why})" for (operator, why), count in sorted(kept.items())
    ]
    return lines or ["portable operators: the network has none that can be fused"]


def _cells(count: int) -> str:
    return f"{count} cell" + ("s" if count > 1 else "")
