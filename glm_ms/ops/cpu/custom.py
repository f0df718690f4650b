"""Functions of the C++ library as MindSpore operators."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import ops

from glm_ms.ops.cpu.library import path


def custom(name: str, out_shape: Any, out_dtype: ms.Type, in_place: bool = False) -> ops.Custom:
    """The operator `glm_ms_op_<name>` of the library.

    Args:
        out_shape: shape of the output, or a function: shapes of the inputs -> shape.
        out_dtype: type of the output.
        in_place: whether it writes into its inputs. The graph then runs it in program order with others that do.
    """
    operator = ops.Custom(f"{path()}:glm_ms_op_{name}", out_shape, out_dtype, "aot")
    if in_place:
        operator.add_prim_attr("side_effect_mem", True)
    return operator
