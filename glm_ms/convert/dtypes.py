"""Element types of stored tensors: one table of names, and conversion between the floating ones.

NumPy has no bfloat16: arrays of that type have the uint16 bit patterns of their elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glm_ms.model.config import FLOAT_TYPES
from glm_ms.ops.packing import float32_to_bfloat16
from glm_ms.storage.errors import CheckpointError

# Elements converted at a time, so that temporaries fit the cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        storage: NumPy type of its arrays, little-endian; uint16 bit patterns for bfloat16.
        safetensors, mindspore: its name in a safetensors header and in a MindSpore checkpoint.
        largest: largest finite value of a floating type, 0 for others.
    """

    storage: np.dtype
    safetensors: str
    mindspore: str
    largest: float = 0.0


DTYPES: dict[str, DType] = {
    "float64": DType(np.dtype("<f8"), "F64", "Float64", float(np.finfo("f8").max)),
    "float32": DType(np.dtype("<f4"), "F32", "Float32", float(np.finfo("f4").max)),
    "float16": DType(np.dtype("<f2"), "F16", "Float16", 65504.0),
    "bfloat16": DType(np.dtype("<u2"), "BF16", "BFloat16", (2 - 2**-7) * 2.0**127),
    "int64": DType(np.dtype("<i8"), "I64", "Int64"),
    "int32": DType(np.dtype("<i4"), "I32", "Int32"),
    "int16": DType(np.dtype("<i2"), "I16", "Int16"),
    "int8": DType(np.dtype("i1"), "I8", "Int8"),
    "uint64": DType(np.dtype("<u8"), "U64", "UInt64"),
    "uint32": DType(np.dtype("<u4"), "U32", "UInt32"),
    "uint16": DType(np.dtype("<u2"), "U16", "UInt16"),
    "uint8": DType(np.dtype("u1"), "U8", "UInt8"),
    "bool": DType(np.dtype("?"), "BOOL", "Bool"),
}
# Bits of the exponent, all set in infinity and NaN only.
_EXPONENT_BITS = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
FROM_SAFETENSORS = {dtype.safetensors: name for name, dtype in DTYPES.items()}
FROM_MINDSPORE = {dtype.mindspore: name for name, dtype in DTYPES.items()}


def check_float_type(dtype: str) -> None:
    """Raises `CheckpointError` if `dtype` is not a type in which weights are stored."""
    if dtype not in FLOAT_TYPES:
        raise CheckpointError(f"dtype {dtype!r}: must be one of {', '.join(FLOAT_TYPES)}")


def is_floating(dtype: str) -> bool:
    """Whether `dtype` is one of the floating types of the table."""
    return dtype in DTYPES and DTYPES[dtype].largest > 0


def check_finite(array: np.ndarray, dtype: str, what: str) -> None:
    """Raises CheckpointError if a tensor in the storage type of a floating `dtype` contains NaN or infinity.

    Other types are not checked. The message names `what`.
    """
    if not is_floating(dtype):
        return
    bits = array.reshape(-1).view(f"<u{array.itemsize}")
    exponent = bits.dtype.type(_EXPONENT_BITS[dtype])
    for start in range(0, bits.size, _CHUNK):
        if ((bits[start : start + _CHUNK] & exponent) == exponent).any():
            raise CheckpointError(
                f"{what}: contains NaN or infinity: the file is damaged, or its training diverged; fetch it again, or "
                "take an earlier checkpoint"
            )


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Values (float32) of bfloat16 bit patterns (uint16), exact, same shape."""
    values = bits.astype(np.uint32)
    values <<= 16  # in place: a large weight is not in memory twice
    return values.view(np.float32)


def convert_dtype(array: np.ndarray, source: str, target: str, what: str) -> np.ndarray:
    """Converts a tensor, in the storage type of `source`, from one floating type to another.

    Returns the array itself if the types are equal, else a new one of the same shape.

    Raises:
        CheckpointError: a type is not floating, or a finite value would become infinite; the message names `what`.
    """
    for dtype in (source, target):
        if not is_floating(dtype):
            raise CheckpointError(f"{what}: type {dtype}: weights must be floating point")
    if source == target:
        return array
    result = np.empty(array.shape, DTYPES[target].storage)
    flat_in, flat_out = array.reshape(-1), result.reshape(-1)
    for start in range(0, flat_in.size, _CHUNK):
        chunk = flat_in[start : start + _CHUNK]
        values = bfloat16_to_float32(chunk) if source == "bfloat16" else chunk
        with np.errstate(over="ignore"):  # the error below names the tensor
            if target == "bfloat16":
                converted = float32_to_bfloat16(values.astype(np.float32))
                finite = (converted & 0x7F80) != 0x7F80  # the exponent of infinity and NaN
            else:
                converted = values.astype(DTYPES[target].storage)
                finite = np.isfinite(converted)
        if not finite.all() and np.isfinite(values[~finite]).any():
            value = values[~finite & np.isfinite(values)][0]
            raise CheckpointError(
                f"{what}: value {value:g} overflows {target} (largest {DTYPES[target].largest:g}); "
                "choose a type with a larger range, such as float32"
            )
        flat_out[start : start + _CHUNK] = converted
    return result
