"""Ascend kernels: the only file that names them. Nothing here has a kernel on a CPU."""

from __future__ import annotations

import os

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore._c_expression import MSContext
from mindspore.ops.operations.math_ops import NPUClearFloatStatusV2, NPUGetFloatStatusV2

# Words of the float status register.
_WORDS = 8


def saturates() -> bool:
    """Whether overflows give the largest number and set a register, in place of infinities.

    So it is on the 910A, and on later cards where MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE is set.
    """
    if ms.get_context("device_target") != "Ascend":
        return False
    if os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE") == "SATURATION_MODE":
        return True
    return MSContext.get_instance().get_ascend_soc_version() == "ascend910"


class FloatStatus(nn.Cell):
    """Reads the float status register and clears it.

    The operators have no data in common with what they watch; `depend` puts them in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = NPUGetFloatStatusV2()
        self.clear = NPUClearFloatStatusV2()
        self.any = ops.ReduceMax()
        self.base = Tensor([0] * _WORDS, ms.int32)

    def construct(self, computed: tuple[Tensor, ...]) -> Tensor:
        """Whether anything has overflowed up to the tensors `computed` since the last call: float32 scalar, 0 or 1."""
        status = self.read(ops.depend(self.base, computed))
        cleared = self.clear(ops.depend(self.base, status))
        status = ops.depend(status, cleared)
        return self.any(ops.cast(ops.not_equal(status, 0), ms.float32))
