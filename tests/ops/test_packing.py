"""Packed weights: every value is found again, and the layout is the one of the kernels."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms.ops.packing import dequantise, pack_int4, pack_int8, pairs_of_outputs, unpack_int4, unpack_int8

SHAPES = [(1, 1), (16, 4), (17, 5), (40, 96), (33, 130)]


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_found_again(shape: tuple[int, int]):
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, shape, dtype=np.int8)
    scale = rng.random(shape[0], np.float32)
    packed = pack_int8(values, scale)
    found, found_scale = unpack_int8(packed)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(found_scale, scale)
    np.testing.assert_array_equal(dequantise(packed), values * scale[:, None])
    n, k = shape
    assert packed.data[(n - 1) // 16, (k - 1) // 4, (n - 1) % 16, (k - 1) % 4] == values[-1, -1]
    assert np.count_nonzero(packed.data) == np.count_nonzero(values)  # the padding is zero


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_found_again(shape: tuple[int, int], group: int):
    rng = np.random.default_rng(1)
    values = rng.integers(-8, 8, shape, dtype=np.int8)
    scale = rng.random((shape[0], -(-shape[1] // group)), np.float32)
    packed = pack_int4(values, scale, group)
    found, found_scale = unpack_int4(packed)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(found_scale, scale.astype(np.float16))
    (n, k), last = shape, shape[1] - 1
    byte = packed.data[(n - 1) // 16, last // 8, (n - 1) % 16, last % 4]
    assert (byte >> 4 if last % 8 >= 4 else byte & 15) == values[-1, -1] + 8
    expected = values * np.repeat(scale.astype(np.float16).astype(np.float32), group, axis=1)[:, :k]
    np.testing.assert_array_equal(dequantise(packed), expected)


@pytest.mark.parametrize("shape", [(2, 1), (16, 32), (34, 130)])
def test_pairs_of_outputs(shape: tuple[int, int]):
    values = np.random.default_rng(2).integers(-8, 8, shape, dtype=np.int8)
    packed = pack_int4(values, np.ones((shape[0], -(-shape[1] // 32))), 32)
    pairs = pairs_of_outputs(packed)
    assert (pairs.dtype, pairs.shape) == (np.int8, (shape[1], shape[0] // 2))
    np.testing.assert_array_equal((pairs << 4) >> 4, values[0::2].T)  # shifts of int8 keep the sign
    np.testing.assert_array_equal(pairs >> 4, values[1::2].T)
    with pytest.raises(ValueError, match="1 outputs: an odd number"):
        pairs_of_outputs(pack_int4(values[:1], np.ones((1, -(-shape[1] // 32))), 32))


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (np.full((2, 32), 8, np.int8), np.ones((2, 1)), "from 8 to 8: expected values from -8 to 7"),
        (np.zeros((2, 32), np.int16), np.ones((2, 1)), "weight int16"),
        (np.zeros((2, 32), np.int8), np.ones((2, 2)), r"scale \(2, 2\): expected \(2, 1\)"),
        (np.zeros((2, 32), np.int8), np.full((2, 1), 1e6), "float16 ends at 65504"),
    ],
)
def test_wrong_int4(values: np.ndarray, scale: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        pack_int4(values, scale, 32)


def test_wrong_group_and_int8():
    with pytest.raises(ValueError, match="group 48: expected one of 32, 64, 128"):
        pack_int4(np.zeros((2, 48), np.int8), np.ones((2, 1)), 48)
    with pytest.raises(ValueError, match="from -128"):
        pack_int8(np.full((2, 3), -128, np.int8), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"scale \(3,\): expected \(2,\)"):
        pack_int8(np.zeros((2, 3), np.int8), np.ones(3, np.float32))
