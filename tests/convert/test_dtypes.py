"""Conversion between floating types, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glm_ms.convert.conversion import parse_size
from glm_ms.convert.dtypes import bfloat16_to_float32, convert_dtype
from glm_ms.ops.packing import float32_to_bfloat16
from glm_ms.storage.errors import CheckpointError


def _patterns() -> np.ndarray:
    """Float32 values of all kinds: every exponent, subnormals, both zeros, infinities, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    edges = [
        0,
        0x80000000,
        1,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x7F800001,
        0xFFFFFFFF,
        0x3F808000,
        0x3F818000,
    ]
    return np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = _patterns()
    ours = bfloat16_to_float32(float32_to_bfloat16(values))
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, expected)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(np.signbit(ours[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_conversion_equals_torch(source: str, target: str) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(getattr(torch, source))
    stored = tensor.view(torch.int16).numpy().view(np.uint16) if source == "bfloat16" else tensor.numpy()
    result = convert_dtype(stored, source, target, "x")
    values = bfloat16_to_float32(result) if target == "bfloat16" else result.astype(np.float32)
    np.testing.assert_array_equal(values, tensor.to(getattr(torch, target)).float().numpy(), strict=True)


def test_large_tensors_are_converted_to_the_last_element() -> None:
    values = np.arange(3_000_001, dtype=np.float32) / 100
    np.testing.assert_array_equal(
        convert_dtype(values, "float32", "float16", "x"), values.astype(np.float16), strict=True
    )


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [("float32", "float16", 70000.0), ("float32", "bfloat16", 3.4e38), ("float64", "float32", 1e300)],
)
def test_overflow_names_tensor_value_and_type(source: str, target: str, value: float) -> None:
    array = np.array([1.0, value], source)
    with pytest.raises(CheckpointError, match=r"file: weight: value .* overflows " + target):
        convert_dtype(array, source, target, "file: weight")


def test_infinities_of_the_source_stay() -> None:
    array = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(convert_dtype(array, "float32", "float16", "x"), array.astype(np.float16))


def test_integers_are_no_weights() -> None:
    with pytest.raises(CheckpointError, match="must be floating point"):
        convert_dtype(np.zeros(2, np.int64), "int64", "float32", "x")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1GiB", 2**30), ("1.5KB", 1500), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2GBB", "nan", "inf GB", "two"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="such as 2GB"):
        parse_size(text)
