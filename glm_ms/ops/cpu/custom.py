"""Functions of the C++ library as MindSpore operators."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from glm_ms.ops.cpu.library import path


def custom(
    name: str, outputs: Sequence[ms.Type], shape: Sequence[int] | None = None, inputs: int = 0, in_place: bool = False
) -> ops.Custom:
    """The operator `glm_ms_op_<name>` of the library.

    Args:
        outputs: types of the outputs.
        shape: that of the only output, the same for all inputs; such an operator may be in no graph of unknown shapes.
            None: the library has a function for the shapes.
        inputs: number of inputs; needed if `shape` is None.
        in_place: whether it writes into its inputs. The graph then runs it in program order with others that do.
    """
    described = None
    if shape is None:
        described = CustomRegOp(f"glm_ms_{name}")
        for index in range(inputs):
            described = described.input(index, f"x{index}")
        for index in range(len(outputs)):
            described = described.output(index, f"y{index}")
        described = described.dtype_format(*[DataType.None_None] * (inputs + len(outputs))).target("CPU").get_op_info()
    types = tuple(outputs) if len(outputs) > 1 else outputs[0]
    operator = ops.Custom(f"{path()}:glm_ms_op_{name}", shape, types, "aot", reg_info=described)
    if in_place:
        operator.add_prim_attr("side_effect_mem", True)
    return operator
