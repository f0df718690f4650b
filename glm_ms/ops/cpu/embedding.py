"""Rows of an embedding in bfloat16, which MindSpore does not gather on a CPU."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.ops.cpu.custom import custom
from glm_ms.ops.cpu.training import has_kernels


class BFloat16Rows(nn.Cell):
    """As `ops.Gather` along the first axis of a table of bfloat16; the rows are float32, exactly."""

    usable = staticmethod(has_kernels)

    def __init__(self) -> None:
        super().__init__()
        self.rows = custom("bf16_rows", [ms.float32], inputs=2)

    def construct(self, table: Parameter, ids: Tensor, axis: int) -> Tensor:
        """table bfloat16 [V, H], ids int32 [...], axis 0 -> float32 [..., H]. An id outside of [0, V) is an error."""
        return self.rows(table, ids)

    def bprop(self, table: Parameter, ids: Tensor, axis: int, _: Tensor, gradient: Tensor) -> tuple:
        """The gradient of the rows -> that of the table, summed in float32. What nobody uses is not computed."""
        count, width = ops.shape(table)
        rows = ops.reshape(gradient, (-1, width))
        of_table = ops.unsorted_segment_sum(rows, ops.reshape(ids, (-1,)), count)
        return ops.cast(of_table, table.dtype), ops.zeros_like(ids), axis
