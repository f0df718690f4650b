"""Operators by device: the portable cell defines each one, a fused kernel of a device computes the same faster.

To add a kernel, write its cell in a file of its own and enter it in `OPERATORS`: `fuse_kernels` then uses it and
`glm_ms.selfcheck` compares it with the portable cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import mindspore as ms
from mindspore import nn

from glm_ms.ops import ascend, training
from glm_ms.ops.cpu import training as cpu_training
from glm_ms.ops.cpu.embedding import BFloat16Rows
from glm_ms.ops.portable import ApplyRotary, CachedAttention, GroupedAttention, RMSNormalize, SwiGLU
from glm_ms.ops.quantized import Int4Product, Int8Product

PORTABLE = "portable"

# (operator, device) -> class of the cell. A fused one takes the inputs of the portable one and gives its result but for
# rounding. `why_not(cell, dtype)` says why it cannot replace a portable cell in a compute type, None if it can, and
# `replacing(cell, dtype)` returns the one that does; `trains` False: it has no gradient.
OPERATORS: dict[tuple[str, str], Any] = {
    ("RMS norm", PORTABLE): RMSNormalize,
    ("RMS norm", "Ascend"): ascend.FusedRMSNormalize,
    ("rotary embedding", PORTABLE): ApplyRotary,
    ("rotary embedding", "Ascend"): ascend.FusedRotary,
    ("attention", PORTABLE): GroupedAttention,
    ("attention", "Ascend"): ascend.FlashAttention,
    ("cached attention", PORTABLE): CachedAttention,
    ("cached attention", "Ascend"): ascend.PagedFlashAttention,
    ("int8 product", PORTABLE): Int8Product,
    ("int8 product", "Ascend"): ascend.FusedInt8Product,
    ("int4 product", PORTABLE): Int4Product,
    ("int4 product", "Ascend"): ascend.FusedInt4Product,
}

# (operator, device) -> class, of operators of a training step. A kernel takes the inputs of the portable one and gives
# its result but for rounding; its `usable` says whether this machine can run it.
STEP_OPERATORS: dict[tuple[str, str], Any] = {
    ("square sum", PORTABLE): training.SquareSum,
    ("square sum", "CPU"): cpu_training.SquareSum,
    ("AdamW", PORTABLE): training.AdamWUpdate,
    ("AdamW", "CPU"): cpu_training.AdamWUpdate,
    # `OPERATORS` has the portable ones of these three.
    ("RMS norm", "CPU"): cpu_training.RMSNormalize,
    ("rotary embedding", "CPU"): cpu_training.ApplyRotary,
    ("attention", "CPU"): cpu_training.GroupedAttention,
    ("SwiGLU", PORTABLE): SwiGLU,
    ("SwiGLU", "CPU"): cpu_training.SwiGLU,
    # glm_ms.model.loss has the portable one, with its output layer; without the other a product is one of float32.
    ("output loss", "CPU"): cpu_training.OutputLoss,
    ("bfloat16 product", "CPU"): cpu_training.BFloat16Product,
    ("bias", "CPU"): cpu_training.AddBias,  # in place of ops.Add
    ("bfloat16 rows", "CPU"): BFloat16Rows,  # in place of ops.Gather
}


def step_kernel(operator: str) -> Any | None:
    """The class of the kernel of an operator of `STEP_OPERATORS` on the current device, None if it has none."""
    kernel = STEP_OPERATORS.get((operator, device()))
    return kernel if kernel is not None and kernel.usable() else None


def step_operator(operator: str) -> nn.Cell:
    """An operator of `STEP_OPERATORS` for the current device: its kernel, or without one the portable cell."""
    return (step_kernel(operator) or STEP_OPERATORS[operator, PORTABLE])()


def device() -> str:
    """Device of the current context."""
    return ms.get_context("device_target")


def operators_of(name: str) -> dict[str, Any]:
    """Operator -> class, of one device or PORTABLE."""
    return {operator: cell for (operator, place), cell in OPERATORS.items() if place == name}


def without_gradient() -> set[str]:
    """Operators whose kernel of the current device cannot train."""
    return {operator for operator, kernel in operators_of(device()).items() if not getattr(kernel, "trains", True)}


def why_portable() -> str | None:
    """Why the current device runs portable operators; None if it has fused kernels."""
    name = device()
    if not operators_of(name):
        others = sorted({place for _, place in OPERATORS} - {PORTABLE})
        return f"the device is {name}, the fused kernels are for {', '.join(others)}"
    return ascend.why_not_fused() if name == "Ascend" else None


def fusable(network: nn.Cell, compute_dtype: ms.Type) -> set[str]:
    """Operators of a network that the current device has a kernel for, in their sizes and this type."""
    return {
        operator
        for parent, place, operator, kernel in _replacements(network)
        if kernel.why_not(getattr(parent, place), compute_dtype) is None
    }


def fuse_kernels(network: nn.Cell, compute_dtype: ms.Type, refused: Mapping[str, str] | None = None) -> list[str]:
    """Replaces every portable operator in a network by its fused kernel, if device and sizes allow it.

    Names of parameters and the results (but for rounding) stay as they are; so do the parameters, but for those of
    quantized products, which get the order of the kernel. Call it before the network is compiled. Strategies of
    `glm_ms.parallel` are for portable operators: do not fuse a sharded network.

    Args:
        refused: operators that stay portable, and why.

    Returns:
        Lines for the user: what was replaced, and what was not and why.
    """
    reason = why_portable()
    if reason is not None:
        return [f"portable operators: {reason}"]
    fused: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for parent, place, operator, kernel in list(_replacements(network)):
        cell = getattr(parent, place)
        why = kernel.why_not(cell, compute_dtype) or (refused or {}).get(operator)
        if why is not None:
            kept[operator, why] += 1
        else:
            _replace(parent, place, kernel.replacing(cell, compute_dtype))
            fused[operator] += 1
    lines = [f"{operator}: fused kernel in {_cells(count)}" for operator, count in sorted(fused.items())]
    lines += [
        f"{operator}: portable operator in {_cells(count)} ({why})" for (operator, why), count in sorted(kept.items())
    ]
    return lines or ["portable operators: the network has none that can be fused"]


def _replace(parent: nn.Cell, place: str, cell: nn.Cell) -> None:
    """Puts a cell there; its parameters get the names of those in the same places of the one before."""
    names = [parameter.name for parameter in getattr(parent, place).get_parameters()]
    setattr(parent, place, cell)
    for parameter, name in zip(cell.get_parameters(), names):
        parameter.name = name


def _replacements(network: nn.Cell) -> Iterator[tuple[nn.Cell, str, str, Any]]:
    """Parent, attribute and name of every portable operator that the device has a kernel for, and its class."""
    kernels = operators_of(device())
    operators = {cell: name for name, cell in operators_of(PORTABLE).items() if name in kernels}
    for _, parent in network.cells_and_names():
        for place, cell in parent.name_cells().items():
            operator = operators.get(type(cell))
            if operator is not None:
                yield parent, place, operator, kernels[operator]


def _cells(count: int) -> str:
    return f"{count} cell" + ("s" if count > 1 else "")
