"""Ascend kernels: the only file that names them. None of them runs on a CPU.

Limits of shapes and types are those of CANN's operator reference (aclnnRmsNorm, aclnnRotaryPositionEmbedding,
aclnnFlashAttentionScore, aclnnWeightQuantBatchMatmulV2) and of its transformer library ATB (ReshapeAndCacheOperation,
PagedAttentionOperation). `tools/check_device.py` compares each cell on a card with the portable one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MSContext
from mindspore.ops.auto_generate import (
    FlashAttentionScore,
    PagedAttention,
    ReshapeAndCache,
    RmsNorm,
    RotaryPositionEmbedding,
    WeightQuantBatchMatmul,
)
from mindspore.ops.operations.math_ops import NPUClearFloatStatusV2, NPUGetFloatStatusV2

from glm_ms.ops.packing import pairs_of_outputs, unpack_int8, unpack_scales
from glm_ms.ops.portable import ApplyRotary, CachedAttention, HeadGroups, RMSNormalize
from glm_ms.ops.quantized import Int4Product, Int8Product, QuantizedProduct

# Words of the float status register.
_WORDS = 8
# Name of the first generation of training cards (Atlas 800, 910A) in the runtime.
_FIRST_GENERATION = "ascend910"
# Mode of RotaryPositionEmbedding that turns channels (2i, 2i + 1); 0 would pair i with i + D/2.
_INTERLEAVED = 1
# Types of attention and of products with integers.
HALF_TYPES = (ms.float16, ms.bfloat16)


def soc_version() -> str:
    """Name of the chip in lower case: "ascend910" (910A), "ascend910b" (A2), "ascend910_93" (A3); "" without one."""
    if ms.get_context("device_target") != "Ascend":
        return ""
    return MSContext.get_instance().get_ascend_soc_version()


def cann_version() -> str:
    """Version of CANN as its files tell it; "" without a card or CANN's environment."""
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home or not soc_version():
        return ""
    try:
        lines = (Path(home) / "compiler" / "version.info").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition("=")[2] for line in lines if line.startswith("Version=")), "of unknown version")


def saturates() -> bool:
    """Whether an overflow gives the largest number and sets a register, in place of infinity.

    True on the 910A, and on later cards with MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE.
    """
    soc, mode = soc_version(), os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE")
    return soc == _FIRST_GENERATION or (soc != "" and mode == "SATURATION_MODE")


def why_not_fused() -> str | None:
    """Why this card has no fused kernels; None if it has them."""
    first = soc_version() == _FIRST_GENERATION
    return "this card (910A) lacks them, cards from 800T A2 on have them" if first else None


def _wrong_type(dtype: ms.Type) -> str:
    return f"compute_dtype {str(dtype).lower()}; the kernel takes float16 and bfloat16"


class FloatStatus(nn.Cell):
    """Reads the float status register and clears it. `depend` orders these operators, which share no data."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.clear, self.any = NPUGetFloatStatusV2(), NPUClearFloatStatusV2(), ops.ReduceMax()
        self.base = Tensor([0] * _WORDS, ms.int32)

    def construct(self, computed: tuple[Tensor, ...]) -> Tensor:
        """Whether anything has overflowed up to the tensors `computed` since the last call: float32 scalar, 0 or 1."""
        status = self.read(ops.depend(self.base, computed))
        cleared = self.clear(ops.depend(self.base, status))
        status = ops.depend(status, cleared)
        return self.any(ops.cast(ops.not_equal(status, 0), ms.float32))


class FusedRMSNormalize(nn.Cell):
    """`RMSNormalize` in one kernel, which computes in float32 inside.

    If the weight has another type than x, both are cast to float32: rounding the weight to the type of x would lose
    digits, and not every card mixes types.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.normalize, self.cast = RmsNorm(eps), ops.Cast()

    @staticmethod
    def why_not(cell: RMSNormalize, dtype: ms.Type) -> None:
        return None

    @staticmethod
    def replacing(cell: RMSNormalize, dtype: ms.Type) -> FusedRMSNormalize:
        return FusedRMSNormalize(cell.eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., H], weight [H] -> [..., H], type of x."""
        if weight.dtype == x.dtype:
            return self.normalize(x, weight)[0]
        y = self.normalize(self.cast(x, ms.float32), self.cast(weight, ms.float32))[0]
        return self.cast(y, x.dtype)


class FusedRotary(nn.Cell):
    """`ApplyRotary` in one kernel.

    The tables have cosine 1 and sine 0 on the half of a head that is not rotated, so the kernel runs over whole heads.
    In the interleaved mode it takes one table for all rows of a batch; batch and sequence therefore become one axis,
    which copies nothing.
    """

    MAX_HEAD_DIM = 895

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.reshape = RotaryPositionEmbedding(), ops.Reshape()

    @staticmethod
    def why_not(cell: ApplyRotary, dtype: ms.Type) -> str | None:
        largest = FusedRotary.MAX_HEAD_DIM
        return f"kv_channels {cell.head_dim} is above {largest}" if cell.head_dim > largest else None

    @staticmethod
    def replacing(cell: ApplyRotary, dtype: ms.Type) -> FusedRotary:
        return FusedRotary()

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, N, D], cos and sin [B, S, 1, D], all of one type -> [B, S, N, D]."""
        shape = ops.shape(x)
        table = (1, -1, 1, shape[3])
        rows = self.reshape(x, (1, -1, shape[2], shape[3]))
        turned = self.turn(rows, self.reshape(cos, table), self.reshape(sin, table), _INTERLEAVED)
        return self.reshape(turned, shape)


class FlashAttention(nn.Cell):
    """`GroupedAttention` without dropout, in one kernel that does not store all scores.

    The kernel takes a mask in place of an additive bias, so the bias may only be 0 (seen) or below 0 (hidden), as
    that of `AttentionBias` is. A query that sees no key, which does not happen there, has an undefined result.
    """

    HEAD_DIM_UNIT, MAX_HEAD_DIM = 16, 512
    LAYOUT = "BSND"

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.width = num_heads * head_dim
        scale = 1.0 / math.sqrt(head_dim)
        self.attention = FlashAttentionScore(head_num=num_heads, scale_value=scale, input_layout=self.LAYOUT)
        self.hidden, self.reshape, self.cast = ops.Less(), ops.Reshape(), ops.Cast()

    @staticmethod
    def why_not(cell: HeadGroups, dtype: ms.Type) -> str | None:
        unit, largest = FlashAttention.HEAD_DIM_UNIT, FlashAttention.MAX_HEAD_DIM
        if dtype not in HALF_TYPES:
            return _wrong_type(dtype)
        if cell.dropout is not None:
            return "attention_dropout is above 0"
        if cell.head_dim % unit or cell.head_dim > largest:
            return f"kv_channels {cell.head_dim}; must be a multiple of {unit} up to {largest}"
        return None

    @staticmethod
    def replacing(cell: HeadGroups, dtype: ms.Type) -> FlashAttention:
        return FlashAttention(cell.num_heads, cell.head_dim)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None) -> Tensor:
        """query [B, S, N, D]; key, value [B, T, G, D], all float16 or all bfloat16; bias float32 [B or 1, 1, S, T];
        seeds: not read -> [B, S, N * D]."""
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        return self.reshape(self.mixed(query, key, value, bias), (batch, length, self.width))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Inputs and result in the order of axes of `LAYOUT`, the bias as in `construct`."""
        mask = self.cast(self.hidden(bias, 0.0), ms.uint8)  # 1 hides
        # Inputs after value: real_shift, drop_mask, padding_mask, attn_mask, prefix, lengths of packed sequences.
        return self.attention(query, key, value, None, None, None, mask, None, None, None)[3]


class FlashTables(FlashAttention):
    """`FlashAttention` over keys and values as flat tables have them, groups before tokens."""

    LAYOUT = "BNSD"

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim)
        self.split_heads, self.merge_heads = ops.Transpose(), ops.Transpose()

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor | None = None) -> Tensor:
        """key, value [B, G, T, D]; others as of `FlashAttention`."""
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        mixed = self.mixed(self.split_heads(query, (0, 2, 1, 3)), key, value, bias)
        return self.reshape(self.merge_heads(mixed, (0, 2, 1, 3)), (batch, length, self.width))


class PagedFlashAttention(CachedAttention):
    """`CachedAttention` by ReshapeAndCache and PagedAttention, which reads the pages in place.

    These kernels need tables [pages, page, G, D], see `glm_ms.model.cache.BlockCache`. The tokens of a chunk of a
    prompt are rows of the kernel, each with the pages of its sequence and its own number of keys: so no keys are
    gathered, no mask is made, and prompts run the kernel of the steps. With flat tables `FlashTables` looks at all
    keys.
    """

    MAX_HEAD_DIM = 256
    whole_pages = True

    def __init__(self, num_heads: int, num_groups: int, head_dim: int) -> None:
        super().__init__(num_heads, num_groups, head_dim)
        self.flash = FlashTables(num_heads, head_dim)
        self.store, self.paged = ReshapeAndCache(), PagedAttention(num_heads, self.scale, num_groups)
        self.query_width, self.key_width = num_heads * head_dim, num_groups * head_dim

    @staticmethod
    def why_not(cell: CachedAttention, dtype: ms.Type) -> str | None:
        largest, reason = PagedFlashAttention.MAX_HEAD_DIM, FlashAttention.why_not(cell, dtype)
        if reason is None and cell.head_dim > largest:
            return f"kv_channels {cell.head_dim} is above {largest}"
        return reason

    @staticmethod
    def replacing(cell: CachedAttention, dtype: ms.Type) -> PagedFlashAttention:
        return PagedFlashAttention(cell.num_heads, cell.num_groups, cell.head_dim)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, cache: tuple) -> Tensor:
        """As `CachedAttention.construct`, in float16 or bfloat16. For tables of whole pages see `BlockCache`; the keys
        that a row sees then begin with the first."""
        keys, values, rows, blocks = cache[0], cache[1], cache[2], cache[3]
        batch, length = ops.shape(query)[0], ops.shape(query)[1]
        if len(ops.shape(keys)) == 2:
            total = ops.shape(bias)[3]
            key = self.all_of(key, keys, rows, blocks, cache[4], total)
            value = self.all_of(value, values, rows, blocks, cache[4], total)
            return self.flash(query, key, value, bias)
        key = self.reshape(key, (batch, length, self.key_width))
        value = self.reshape(value, (batch, length, self.key_width))
        stored = self.store(key, value, keys, values, rows)
        if length > 1:
            pages = ops.shape(blocks)[1]
            blocks = self.reshape(ops.broadcast_to(ops.expand_dims(blocks, 1), (batch, length, pages)), (-1, pages))
        query = self.reshape(ops.depend(query, stored), (batch * length, 1, self.query_width))
        mixed = self.paged(query, keys, values, blocks, cache[6])
        return self.reshape(mixed, (batch, length, self.query_width))


class FusedProduct(nn.Cell):
    """`QuantizedProduct` by WeightQuantBatchMatmul, which reads the integers and multiplies them by scales inside.

    It has the integers in the order of the kernel, and scales of the type of the product, to which they are rounded. It
    has no gradient.

    Args:
        weight, scale: as `product`, a WeightQuantBatchMatmul, takes them.
        dtype: type of the product.
    """

    trains = False
    LARGEST = 65535  # inputs and outputs

    def __init__(self, product: Any, weight: Tensor, scale: np.ndarray, dtype: ms.Type) -> None:
        super().__init__()
        self.product, self.dtype = product, dtype
        self.weight = Parameter(weight, name="weight", requires_grad=False)
        self.scale = Parameter(Tensor(scale, dtype), name="scale", requires_grad=False)
        self.cast = ops.Cast()

    @classmethod
    def why_not(cls, cell: QuantizedProduct, dtype: ms.Type) -> str | None:
        if dtype not in HALF_TYPES:
            return _wrong_type(dtype)
        if max(cell.in_features, cell.out_features) > cls.LARGEST:
            return f"{cell.in_features} inputs and {cell.out_features} outputs; the kernel takes up to {cls.LARGEST}"
        return None

    def construct(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out] of the type `dtype`."""
        return self.product(self.cast(x, self.dtype), self.weight, self.scale, None, None, None, None)


class FusedInt8Product(FusedProduct):
    """Integers int8 [out, in], a scale for each output."""

    # Normal numbers of float16; smaller ones lose digits.
    SCALES = 2.0**-14, 65504.0

    @classmethod
    def why_not(cls, cell: QuantizedProduct, dtype: ms.Type) -> str | None:
        reason = super().why_not(cell, dtype)
        if reason is None and dtype == ms.float16:
            scale, (smallest, largest) = cell.scale.asnumpy(), cls.SCALES
            if scale[scale != 0].min(initial=1.0) < smallest or scale.max(initial=0.0) > largest:
                return "a scale is no normal number of float16; compute in bfloat16"
        return reason

    @staticmethod
    def replacing(cell: Int8Product, dtype: ms.Type) -> FusedInt8Product:
        integers, scale = unpack_int8(cell.packed())
        return FusedInt8Product(WeightQuantBatchMatmul(transpose_weight=True), Tensor(integers), scale, dtype)


class FusedInt4Product(FusedProduct):
    """Integers of 4 bits [in, out], two outputs in a byte; scales [in / group, out]."""

    @classmethod
    def why_not(cls, cell: QuantizedProduct, dtype: ms.Type) -> str | None:
        reason = super().why_not(cell, dtype)
        if reason is None and cell.out_features % 2:
            return f"{cell.out_features} outputs; the kernel takes even numbers"
        if reason is None and cell.group >= cell.in_features:
            return f"groups of {cell.group} of {cell.in_features} inputs; the kernel takes smaller groups"
        return reason

    @staticmethod
    def replacing(cell: Int4Product, dtype: ms.Type) -> FusedInt4Product:
        packed, product = cell.packed(), WeightQuantBatchMatmul(antiquant_group_size=cell.group)
        scale = np.ascontiguousarray(unpack_scales(packed).T)
        return FusedInt4Product(product, Tensor(pairs_of_outputs(packed), ms.qint4x2), scale, dtype)
