"""Formats of packed weights, in NumPy. This file defines them; the C++ kernels read them.

A weight has n outputs and k inputs. Panels have 16 outputs each, so that one load of a kernel has values of several
outputs for the same inputs. Padded outputs and inputs are zero.

int8, one scale per output: `data` int8 [ceil(n / 16), ceil(k / 4), 16, 4], `scale` float32 [n]; value = q * scale.

int4, one scale per output and group of 32, 64 or 128 inputs: q in [-8, 7] is stored as u = q + 8. `data` uint8
[ceil(n / 16), K / 8, 16, 4] with K = k padded to whole groups; byte j of a block has input j in its low and input j + 4
in its high nibble. `scale` float16 [ceil(n / 16), K / group, 16].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PANEL = 16
GROUPS = (32, 64, 128)


class Packed(NamedTuple):
    """`data` and `scale` as above; `shape` (n, k); `group` 0 for int8."""

    data: np.ndarray
    scale: np.ndarray
    shape: tuple[int, int]
    group: int


def pack_int8(quantised: np.ndarray, scale: np.ndarray) -> Packed:
    """Packs int8 [n, k] with values in [-127, 127] and float32 scales [n].

    Raises:
        ValueError: wrong shape, dtype or range.
    """
    _check(quantised, np.int8, -127, 127)
    n, k = quantised.shape
    if scale.shape != (n,):
        raise ValueError(f"scale {scale.shape}: expected {(n,)}")
    data = _panels(quantised, 4)
    return Packed(data, np.ascontiguousarray(scale, dtype=np.float32), (n, k), 0)


def unpack_int8(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `pack_int8`."""
    n, k = packed.shape
    panels, blocks = packed.data.shape[:2]
    rows = packed.data.transpose(0, 2, 1, 3).reshape(panels * PANEL, blocks * 4)
    return np.ascontiguousarray(rows[:n, :k]), packed.scale


def pack_int4(quantised: np.ndarray, scale: np.ndarray, group: int) -> Packed:
    """Packs int8 [n, k] with values in [-8, 7] and scales [n, ceil(k / group)], which are rounded to float16.

    Raises:
        ValueError: wrong shape, dtype, range or group; a scale that float16 cannot express.
    """
    if group not in GROUPS:
        raise ValueError(f"group {group}: expected one of {', '.join(map(str, GROUPS))}")
    _check(quantised, np.int8, -8, 7)
    n, k = quantised.shape
    groups = -(-k // group)
    if scale.shape != (n, groups):
        raise ValueError(f"scale {scale.shape}: expected {(n, groups)}")
    with np.errstate(over="ignore"):
        half = np.asarray(scale).astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"scale {np.abs(scale).max()}: float16 ends at 65504")
    padded = np.zeros((n, groups * group), np.int8)
    padded[:, :k] = quantised
    values = (_panels(padded, 8) + 8).astype(np.uint8)  # [panels, blocks, 16, 8]
    scales = np.zeros((values.shape[0] * PANEL, groups), np.float16)
    scales[:n] = half
    scales = np.ascontiguousarray(scales.reshape(-1, PANEL, groups).transpose(0, 2, 1))
    return Packed(values[..., :4] | values[..., 4:] << 4, scales, (n, k), group)


def unpack_int4(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Int8 [n, k] and float16 scales [n, ceil(k / group)] of `pack_int4`."""
    n, k = packed.shape
    panels, blocks = packed.data.shape[:2]
    values = np.concatenate([packed.data & 15, packed.data >> 4], axis=-1).astype(np.int8) - 8
    rows = values.transpose(0, 2, 1, 3).reshape(panels * PANEL, blocks * 8)
    return np.ascontiguousarray(rows[:n, :k]), unpack_scales(packed)


def unpack_scales(packed: Packed) -> np.ndarray:
    """Float16 scales [n, ceil(k / group)] of `pack_int4`."""
    panels, groups = packed.scale.shape[:2]
    scales = packed.scale.transpose(0, 2, 1).reshape(panels * PANEL, groups)
    return np.ascontiguousarray(scales[: packed.shape[0]])


def pairs_of_outputs(packed: Packed) -> np.ndarray:
    """The integers of `pack_int4` as int8 [k, n / 2] in two's complement: output 2i in the low nibble of byte i, output
    2i + 1 in the high one. Raises ValueError for an odd n."""
    n, k = packed.shape
    if n % 2:
        raise ValueError(f"{n} outputs: an odd number has no pairs")
    panels, blocks = packed.data.shape[:2]
    words, low = packed.data.view(np.uint32)[..., 0], np.uint32(0x0F0F0F0F)  # four bytes at a time
    even, odd = words[:, :, 0::2], words[:, :, 1::2]
    both = np.empty((panels, blocks, 2, 8), np.uint32)  # inputs j and j + 4 of a block
    both[:, :, 0] = even & low | (odd & low) << np.uint32(4)
    both[:, :, 1] = even >> np.uint32(4) & low | odd & ~low
    values = both.view(np.uint8).reshape(panels, blocks, 2, 8, 4)
    rows = np.empty((blocks, 2, 4, panels, 8), np.uint8)
    for j in range(4):
        rows[:, :, j] = values[..., j].transpose(1, 2, 0, 3)
    wanted = rows.reshape(blocks * 8, panels * PANEL // 2)[:k, : n // 2]
    return np.ascontiguousarray(wanted ^ 0x88).view(np.int8)  # u = q + 8 -> q


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 values rounded to the nearest bfloat16, ties to even, same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # rounding would turn some NaNs into numbers; write a quiet NaN with the same sign
        rounded = np.where(nan, ((bits >> 16) & 0x8000 | 0x7FC0).astype(np.uint16), rounded)
    return rounded


def dequantise(packed: Packed) -> np.ndarray:
    """Float32 [n, k]: the weight that the packed one stands for."""
    if packed.group == 0:
        values, scale = unpack_int8(packed)
        return values.astype(np.float32) * scale[:, None]
    values, scale = unpack_int4(packed)
    return values.astype(np.float32) * np.repeat(scale.astype(np.float32), packed.group, axis=1)[:, : packed.shape[1]]


def _check(values: np.ndarray, dtype: type, low: int, high: int) -> None:
    if values.ndim != 2 or values.dtype != dtype:
        raise ValueError(f"weight {values.dtype} {values.shape}: expected {np.dtype(dtype)} [n, k]")
    if values.size and (values.min() < low or values.max() > high):
        raise ValueError(f"weight from {values.min()} to {values.max()}: expected values from {low} to {high}")


def _panels(values: np.ndarray, inputs: int) -> np.ndarray:
    """[n, k] -> [ceil(n / 16), ceil(k / inputs), 16, inputs], padded with zeros."""
    n, k = values.shape
    panels, blocks = -(-n // PANEL), -(-k // inputs)
    padded = np.zeros((panels * PANEL, blocks * inputs), values.dtype)
    padded[:n, :k] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, blocks, inputs).transpose(0, 2, 1, 3))
