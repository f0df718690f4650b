"""Scales and integers: ranges, exactness of what needs no rounding, and that every search lowers the error."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms.ops import packing
from glm_ms.ops.packing import dequantise, pack_int4, pack_int8
from glm_ms.quant import GROUPS, Quantization, QuantizationError, quantization
from glm_ms.quant.algorithms import nearest, quantize_int4, quantize_int8

SHAPES = [(16, 128), (37, 100), (5, 33), (1, 8), (50, 384)]


def heavy_tailed(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Weights with outliers, as those of trained networks."""
    return (0.02 * np.random.default_rng(seed).standard_t(4, (rows, width))).astype(np.float32)


def int8(weight: np.ndarray) -> np.ndarray:
    return dequantise(pack_int8(*quantize_int8(weight)))


def int4(weight: np.ndarray, group: int) -> np.ndarray:
    return dequantise(pack_int4(*quantize_int4(weight, group), group))


def rounded_to_largest(weight: np.ndarray, group: int, low: int, high: int) -> np.ndarray:
    """Without a search: the largest weight of a group, a divisor of the inputs, is the end of the range."""
    parts = weight.reshape(-1, group)
    scale = np.abs(parts).max(1) / high
    return (nearest(parts, scale, low, high) * scale[:, None]).reshape(weight.shape)


def mean_square(error: np.ndarray) -> float:
    return float(np.square(error, dtype=np.float64).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_of_8_bits_lowers_the_error(shape: tuple[int, int]) -> None:
    weight = heavy_tailed(*shape)
    q, scale = quantize_int8(weight)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (np.int8, np.float32, shape, shape[:1])
    assert np.abs(q.astype(int)).max() <= 127
    plain = rounded_to_largest(weight, shape[1], -127, 127)
    assert mean_square(int8(weight) - weight) <= mean_square(plain - weight)


@pytest.mark.parametrize("group", GROUPS)
def test_the_search_of_4_bits_lowers_the_error_by_a_fifth(group: int) -> None:
    weight = heavy_tailed(64, 384)
    found, plain = int4(weight, group), rounded_to_largest(weight, group, -7, 7)
    assert mean_square(found - weight) < 0.8 * mean_square(plain - weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", GROUPS)
def test_shapes_and_ranges_of_4_bits(shape: tuple[int, int], group: int) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    q, scale = quantize_int4(weight, group)
    assert (q.dtype, scale.dtype, q.shape) == (np.int8, np.float16, shape)
    assert scale.shape == (shape[0], -(-shape[1] // group))
    assert q.min() >= -8
    assert q.max() <= 7
    assert np.sqrt(mean_square(int4(weight, group) - weight)) < 0.15 * weight.std()


def test_a_smaller_group_has_a_smaller_error() -> None:
    weight = heavy_tailed(64, 384)
    errors = [mean_square(int4(weight, group) - weight) for group in GROUPS]
    assert errors == sorted(errors)


def test_integers_times_a_scale_are_exact() -> None:
    generator = np.random.default_rng(0)
    q8, q4 = generator.integers(-127, 128, (20, 64)), generator.integers(-7, 8, (20, 64))
    q8[:, 5], q4[:, 5], q4[:, 40] = 127, -8, -8
    np.testing.assert_array_equal(int8(q8 * np.float32(0.25)), q8 * 0.25)
    np.testing.assert_array_equal(int4(q4 * np.float32(-0.25), 32), q4 * -0.25)


def test_zeros() -> None:
    weight = heavy_tailed(20, 64)
    weight[3], weight[:, 32:] = 0, 0
    for found in (int8(weight), int4(weight, 32)):
        assert np.isfinite(found).all()
        assert not found[3].any()
        assert not found[:, 32:].any()


def test_the_result_does_not_depend_on_other_rows_or_on_the_type() -> None:
    weight = heavy_tailed(500, 1024).astype(np.float16)  # several chunks
    q, scale = quantize_int4(weight, 32)
    for part in (slice(0, 1), slice(77, 300)):
        q_part, scale_part = quantize_int4(weight[part].astype(np.float32), 32)
        np.testing.assert_array_equal(q_part, q[part])
        np.testing.assert_array_equal(scale_part, scale[part])


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [(5, None, "5 bits: must be 8 or 4"), (8, 32, "group 32 with 8 bits"), (4, 48, "must be one of 32, 64, 128")],
)
def test_other_bits_and_groups_are_refused(bits: int, group: int | None, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantization(bits, group)


def test_defaults() -> None:
    assert packing.GROUPS == GROUPS
    assert quantization(4) == Quantization(4, 32)
    assert quantization(8) == Quantization(8, 0)
    assert quantization(4, 128).kind == "int4-group128"
