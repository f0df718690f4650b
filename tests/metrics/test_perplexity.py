"""Perplexity: weighting, precision, and what is not a number."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from glm_ms.metrics import PerplexityMetric


def test_weighted_by_tokens():
    metric = PerplexityMetric()
    metric.update(6.0, 2)
    metric.update(np.float32(1.0), np.int64(8))
    metric.update(0.0, 0)
    assert metric.result() == {
        "loss": pytest.approx(0.7, abs=1e-15),
        "perplexity": pytest.approx(math.exp(0.7), abs=1e-14),
        "num_tokens": 10,
    }


def test_sums_in_float64():
    metric = PerplexityMetric()
    metric.update(np.float32(2**25), 1)
    for _ in range(1000):
        metric.update(np.float32(1), 1)  # each would be lost in a float32 sum
    assert metric.result()["loss"] == (2**25 + 1000) / 1001


def test_overflow_is_infinite_and_said(caplog):
    metric = PerplexityMetric()
    metric.update(8000.0, 10)
    with caplog.at_level(logging.WARNING, logger="glm_ms"):
        result = metric.result()
    assert result == {"loss": 800.0, "perplexity": math.inf, "num_tokens": 10}
    assert "perplexity is inf" in caplog.text


def test_not_a_number_stays_visible(caplog):
    metric = PerplexityMetric()
    metric.update(math.nan, 10)
    with caplog.at_level(logging.WARNING, logger="glm_ms"):
        result = metric.result()
    assert math.isnan(result["perplexity"])
    assert "nan" in caplog.text


def test_no_tokens_is_an_error():
    metric = PerplexityMetric()
    with pytest.raises(ValueError, match="no target tokens"):
        metric.result()


@pytest.mark.parametrize("num_tokens", [-1, 2.5])
def test_token_count_must_be_whole(num_tokens):
    with pytest.raises(ValueError, match="whole number"):
        PerplexityMetric().update(1.0, num_tokens)


def test_loss_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="over 0 tokens"):
        PerplexityMetric().update(1.0, 0)
