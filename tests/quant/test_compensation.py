"""Rounding with compensation: the factor of the moments, and the error of results with and without it."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms.ops.packing import dequantise, pack_int4, pack_int8
from glm_ms.quant import compensation
from glm_ms.quant.algorithms import quantize_int4, quantize_int8
from glm_ms.quant.compensation import Inputs


def correlated(width: int, tokens: int = 3000) -> np.ndarray:
    """Activations with a few directions that are common, and a few inputs that are 20 times as large."""
    rng = np.random.default_rng(1)
    size = np.where(np.arange(width) % 16 == 3, 20, 1) * rng.uniform(0.5, 1.5, width)
    common = rng.normal(size=(tokens, 8)) @ rng.normal(size=(8, width))
    return ((rng.normal(size=(tokens, width)) + common) * size).astype(np.float32)


def inputs_of(x: np.ndarray) -> Inputs:
    return Inputs.of(x.T @ x / np.float32(len(x)))


def weight(rows: int, width: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_t(4, (rows, width))).astype(np.float32)


def int8(w: np.ndarray, inputs: Inputs | None = None) -> np.ndarray:
    return dequantise(pack_int8(*quantize_int8(w, inputs)))


def int4(w: np.ndarray, group: int, inputs: Inputs | None = None) -> np.ndarray:
    return dequantise(pack_int4(*quantize_int4(w, group, inputs), group))


def error(x: np.ndarray, found: np.ndarray, w: np.ndarray) -> float:
    """Mean square of the difference of results."""
    return float(np.square(x @ (found - w).T, dtype=np.float64).mean())


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_the_factor_is_that_of_the_damped_moments(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "_BLOCK", block)
    x = correlated(64)
    moments = x.T @ x / np.float32(len(x))
    found = Inputs.of(np.tril(moments))
    lower = np.tril(found.lower.astype(np.float64)) * np.sqrt(found.importance)
    np.testing.assert_allclose(np.diag(found.lower), 1, rtol=1e-6)
    damped = moments + np.diag(0.01 * np.diag(moments).mean() + 1e-4 * np.diag(moments))
    scale = np.sqrt(np.outer(np.diag(damped), np.diag(damped)))
    np.testing.assert_allclose(lower @ lower.T / scale, damped / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [384, 100])
def test_each_input_makes_up_for_the_later_ones(width: int) -> None:
    """The definition, one output at a time: q is nearest to the weight plus what the later inputs have lost."""
    w, inputs = weight(3, width), inputs_of(correlated(width))
    q, scale = quantize_int4(w, 32, inputs)
    scales = np.repeat(scale.astype(np.float64), 32, axis=1)[:, :width]
    errors = w - q * scales
    for j in range(width):
        lost = errors[:, j + 1 :] @ inputs.lower[j + 1 :, j].astype(np.float64)
        exact = (w[:, j] + lost) / scales[:, j]
        assert (np.abs(np.clip(exact, -8, 7) - q[:, j]) < 0.501).all()


@pytest.mark.parametrize("group", [32, 128])
def test_compensation_halves_the_error_of_4_bits(group: int) -> None:
    w, x = weight(64, 384), correlated(384)
    assert error(x, int4(w, group, inputs_of(x)), w) < 0.5 * error(x, int4(w, group), w)


def test_compensation_halves_the_error_of_8_bits() -> None:
    w, x = weight(64, 384), correlated(384)
    assert error(x, int8(w, inputs_of(x)), w) < 0.5 * error(x, int8(w), w)


def test_inputs_without_correlation_and_without_text() -> None:
    """Nothing to make up for: plain rounding; inputs that no text has stay near their weights."""
    w = weight(8, 64)
    for moments in (np.eye(64, dtype=np.float32), np.zeros((64, 64), np.float32)):
        np.testing.assert_array_equal(int4(w, 32, Inputs.of(moments)), int4(w, 32))
    np.testing.assert_allclose(int8(w, Inputs.of(np.eye(64, dtype=np.float32))), int8(w), rtol=1e-6)
    x = correlated(64)
    x[:, 5:9] = 0
    q, scale = quantize_int4(w, 32, inputs_of(x))
    exact = np.clip(w[:, 5:9] / scale[:, :1].astype(np.float32), -8, 7)
    assert np.abs(q[:, 5:9] - exact).max() <= 0.501


def test_more_inputs_than_tokens() -> None:
    w, x = weight(16, 384), correlated(384, tokens=20)
    found = int4(w, 32, inputs_of(x))
    assert error(x, found, w) < 0.5 * error(x, int4(w, 32), w)
    assert np.sqrt(np.square(found - w).mean()) < 0.2 * w.std()


def test_weights_that_float16_scales_cannot_express() -> None:
    w = weight(4, 64)
    w[1, 3] = 1e7
    _, scale = quantize_int4(w, 32, inputs_of(correlated(64)))
    assert not np.isfinite(scale[1]).all()
    assert np.isfinite(scale[[0, 2, 3]]).all()
