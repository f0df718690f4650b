"""The C++ operators of the decoder as MindSpore operators, and what they read: norms, linear layers, numbers.

All of them take the table of a run (`glm_ms.ops.cpu.rows`) and rows [R, ...] of a static graph, of which they compute
as many as the table says. Weights are the network's own parameters, in the type they have.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm_ms.ops.cpu import library


def operator(name: str, shape: tuple[int, ...], dtype: ms.Type = ms.float32) -> ops.Custom:
    """The operator `glm_ms_<name>` of the library, with the static shape of its result.

    It writes to memory that MindSpore does not see, as the pages of a cache: nothing may drop or reorder it.
    """
    found = ops.Custom(f"{library.path()}:glm_ms_{name}", shape, dtype, "aot")
    found.add_prim_attr("side_effect_mem", True)
    return found


def absent() -> Tensor:
    """Stands for what a network does not have, for example a bias."""
    return Tensor(np.zeros(1, np.bool_))


def norm_inputs(norm: nn.Cell | None) -> tuple[list[Any], list[float]]:
    """Inputs and numbers of a `glm_ms.model.layers.Norm`; None: there is no norm."""
    if norm is None:
        return [absent(), absent()], [0.0]
    return [norm.weight, absent() if norm.bias is None else norm.bias], [norm.normalize.eps]


def linear_inputs(linear: nn.Cell) -> tuple[list[Any], list[float]]:
    """Inputs and numbers of a linear layer with its low-rank update.

    A quantized layer has its packed weight and scales in `quantized` (`glm_ms.ops.packing`). Updates have `a` and `b`,
    and a factor `scaling` if B does not include it.
    """
    stored, update = getattr(linear, "quantized", linear), linear.lora
    arrays = [stored.weight, getattr(stored, "scale", None), linear.bias]
    arrays += [None, None] if update is None else [update.a, update.b]
    sizes = [linear.in_features, linear.out_features, getattr(update, "scaling", 1.0)]
    return [absent() if array is None else array for array in arrays], sizes
