"""Kernels chosen once: puts fused Ascend kernels in the place of portable operators, after a network is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mindspore as ms
from mindspore import nn

from glm_ms.ops import ascend
from glm_ms.ops.attention import GroupedAttention
from glm_ms.ops.norm import RMSNormalize
from glm_ms.ops.quantized import QuantizedMatMul
from glm_ms.ops.rotary import ApplyRotary


def _rms_norm(cell: RMSNormalize, dtype: ms.Type) -> nn.Cell | str:
    return ascend.FusedRMSNormalize(cell.eps)


def _rotary(cell: ApplyRotary, dtype: ms.Type) -> nn.Cell | str:
    if cell.head_dim > ascend.FusedRotary.MAX_HEAD_DIM:
        return f"kv_channels {cell.head_dim} is above {ascend.FusedRotary.MAX_HEAD_DIM}"
    return ascend.FusedRotary()


def _attention(cell: GroupedAttention, dtype: ms.Type) -> nn.Cell | str:
    kernel = ascend.FlashAttention
    if dtype not in kernel.DTYPES:
        return f"compute_dtype {_name(dtype)}; the kernel takes float16 and bfloat16"
    if cell.dropout is not None:
        return "attention_dropout is above 0"
    if cell.head_dim % kernel.HEAD_DIM_UNIT or cell.head_dim > kernel.MAX_HEAD_DIM:
        return f"kv_channels {cell.head_dim}; must be a multiple of {kernel.HEAD_DIM_UNIT} up to {kernel.MAX_HEAD_DIM}"
    return kernel(cell.num_heads, cell.head_dim)


def _quantized(cell: QuantizedMatMul, dtype: ms.Type) -> nn.Cell | str:
    if dtype not in ascend.FusedQuantizedMatMul.DTYPES:
        return f"compute_dtype {_name(dtype)}; the kernel takes float16 and bfloat16"
    return ascend.FusedQuantizedMatMul()


_RULES: dict[type, tuple[str, Callable[[nn.Cell, ms.Type], nn.Cell | str]]] = {
    RMSNormalize: ("RMS norm", _rms_norm),
    ApplyRotary: ("rotary embedding", _rotary),
    GroupedAttention: ("flash attention", _attention),
    QuantizedMatMul: ("int8 matmul", _quantized),
}


def fuse_kernels(network: nn.Cell, compute_dtype: ms.Type) -> list[str]:
    """Replaces every portable operator in a network by its fused kernel, where the device and the sizes allow it.

    Parameters, their names and the results (but for rounding) stay as they are. To be called before the network is
    compiled. Strategies of `glm_ms.parallel` are for portable operators: a network that is cut over cards is not fused.

    Args:
        network: changed in place.
        compute_dtype: type of the matrix products of the network.

    Returns:
        Lines for the user: what was replaced, and what was not and why. Without fused kernels on this device one
        line says so, and nothing is changed.
    """
    reason = ascend.why_not_fused()
    if reason is not None:
        return [f"portable operators: {reason}"]
    fused: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for _, parent in list(network.cells_and_names()):
        for name, cell in parent.name_cells().items():
            if type(cell) not in _RULES:
                continue
            kind, counterpart = _RULES[type(cell)]
            choice = counterpart(cell, compute_dtype)
            if isinstance(choice, str):
                kept[kind, choice] += 1
            else:
                setattr(parent, name, choice)
                fused[kind] += 1
    lines = [f"{kind}: fused kernel in {_cells(count)}" for kind, count in sorted(fused.items())]
    lines += [
        f"{kind}: portable operator in {_cells(count)} ({why})" for (kind, why), count in sorted(kept.items())
    ]
    return lines or ["portable operators: the network has none that can be fused"]


def _cells(count: int) -> str:
    return f"{count} cell" + ("s" if count > 1 else "")


def _name(dtype: ms.Type) -> str:
    return str(dtype).lower()
