"""Ascend kernels: the only file that names them. Nothing here has a kernel on a CPU.

A fused cell takes the same arguments as the portable one it stands for and gives the same result but for rounding;
`glm_ms.ops.fusion` puts it in its place, `tools/check_device.py` compares the two on a card. Limits of shapes and types
are those of CANN's operator reference (aclnnRmsNorm, aclnnRotaryPositionEmbedding, aclnnFlashAttentionScore,
aclnnWeightQuantBatchMatmulV2).
"""

from __future__ import annotations

import math
import os

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore._c_expression import MSContext
from mindspore.ops.auto_generate import (
    FlashAttentionScore,
    RmsNorm,
    RotaryPositionEmbedding,
    WeightQuantBatchMatmul,
)
from mindspore.ops.operations.math_ops import NPUClearFloatStatusV2, NPUGetFloatStatusV2

# Words of the float status register.
_WORDS = 8
# What the runtime calls the first generation of training cards (Atlas 800, 910A).
_FIRST_GENERATION = "ascend910"
# Mode of RotaryPositionEmbedding that turns channels (2i, 2i + 1); 0 would pair i with i + D/2.
_INTERLEAVED = 1


def soc_version() -> str:
    """Name of the chip in lower case: "ascend910" (910A), "ascend910b" (A2), "ascend910_93" (A3); "" without one."""
    if ms.get_context("device_target") != "Ascend":
        return ""
    return MSContext.get_instance().get_ascend_soc_version()


def saturates() -> bool:
    """Whether overflows give the largest number and set a register, in place of infinities.

    So it is on the 910A, and on later cards where MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE is set.
    """
    if ms.get_context("device_target") != "Ascend":
        return False
    if os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE") == "SATURATION_MODE":
        return True
    return soc_version() == _FIRST_GENERATION


def why_not_fused() -> str | None:
    """Why this device has no fused kernels; None where it has them."""
    target = ms.get_context("device_target")
    if target != "Ascend":
        return f"the device is {target}, the fused kernels are Ascend's"
    if soc_version() == _FIRST_GENERATION:
        return "this card (910A) lacks them, cards from 800T A2 on have them"
    return None


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


class FusedRMSNormalize(nn.Cell):
    """`glm_ms.ops.norm.RMSNormalize` in one kernel, which computes in float32 inside.

    A weight of another type than x takes both through float32: rounding it to the type of x would cost digits, and
    not every card mixes types.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.normalize = RmsNorm(eps)
        self.cast = ops.Cast()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., H], weight [H] -> [..., H], type of x."""
        if weight.dtype == x.dtype:
            return self.normalize(x, weight)[0]
        y = self.normalize(self.cast(x, ms.float32), self.cast(weight, ms.float32))[0]
        return self.cast(y, x.dtype)


class FusedRotary(nn.Cell):
    """`glm_ms.ops.rotary.ApplyRotary` in one kernel.

    The tables have cosine 1 and sine 0 on the half of a head that is not turned, so the kernel runs over whole heads.
    In the interleaved mode it takes one table for all rows of a batch only; batch and sequence are therefore laid into
    one axis, which copies nothing.
    """

    MAX_HEAD_DIM = 895

    def __init__(self) -> None:
        super().__init__()
        self.turn = RotaryPositionEmbedding()
        self.reshape = ops.Reshape()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D], all of one type -> [B, S, N, D]."""
        shape = ops.shape(x)
        table = (1, -1, 1, shape[3])
        rows = self.reshape(x, (1, -1, shape[2], shape[3]))
        turned = self.turn(rows, self.reshape(cos, table), self.reshape(sin, table), _INTERLEAVED)
        return self.reshape(turned, shape)


class FlashAttention(nn.Cell):
    """`glm_ms.ops.attention.GroupedAttention` without dropout, in one kernel that never holds all scores.

    The kernel hides by a mask and not by an additive bias, so the bias may only say "seen" (0) or "hidden" (below
    0), as that of `glm_ms.model.mask` does. A query that sees nothing, which never happens there, has an undefined
    result.

    Args:
        num_heads: query heads N.
        head_dim: channels D of a head, a multiple of `HEAD_DIM_UNIT` up to `MAX_HEAD_DIM`.
    """

    HEAD_DIM_UNIT, MAX_HEAD_DIM = 16, 512
    DTYPES = (ms.float16, ms.bfloat16)

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.width = num_heads * head_dim
        self.attention = FlashAttentionScore(
            head_num=num_heads, scale_value=1.0 / math.sqrt(head_dim), input_layout="BNSD"
        )
        self.hidden = ops.Less()
        self.split_heads = ops.Transpose()
        self.merge_heads = ops.Transpose()
        self.reshape = ops.Reshape()
        self.cast = ops.Cast()

    def construct(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None
    ) -> Tensor:
        """query [B, S, N, D]; key, value [B, G, T, D], all float16 or all bfloat16; bias float32 [B or 1, 1, S, T];
        seeds: not read -> [B, S, N * D]."""
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        query = self.split_heads(query, (0, 2, 1, 3))
        mask = self.cast(self.hidden(bias, 0.0), ms.uint8)  # 1 hides
        # Inputs after value: real_shift, drop_mask, padding_mask, attn_mask, prefix, lengths of packed sequences.
        mixed = self.attention(query, key, value, None, None, None, mask, None, None, None)[3]
        return self.reshape(self.merge_heads(mixed, (0, 2, 1, 3)), (batch, length, self.width))


class FusedQuantizedMatMul(nn.Cell):
    """`glm_ms.ops.quantized.QuantizedMatMul` in one kernel that never holds the weight in floating point.

    The kernel has no gradient of its own. That of x is (dy * scale) weight, the same kernel with scales of 1.
    """

    DTYPES = (ms.float16, ms.bfloat16)

    def __init__(self) -> None:
        super().__init__()
        self.multiply = WeightQuantBatchMatmul(transpose_weight=True)
        self.multiply_back = WeightQuantBatchMatmul()
        self.weigh = ops.Mul()
        self.zeros = ops.ZerosLike()
        self.cast = ops.Cast()

    def construct(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x [M, K] float16 or bfloat16, weight int8 [N, K], scale [N] -> [M, N], type of x."""
        return self.multiply(x, weight, self.cast(scale, x.dtype))

    def bprop(self, x: Tensor, weight: Tensor, scale: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Gradient of x; zeros for weight and scale, which are frozen."""
        ones = ops.ones((ops.shape(weight)[1],), x.dtype)
        weighed = self.weigh(dout, self.cast(scale, x.dtype))
        return self.multiply_back(weighed, weight, ones), self.zeros(weight), self.zeros(scale)
