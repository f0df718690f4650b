"""Scores of generated text and of language models. Needs neither MindSpore nor a device.

A new metric is a subclass of `Metric` in a file of its own and a line in METRICS.
"""

from __future__ import annotations

from collections.abc import Iterable

from glm_ms.metrics.adgen import SCORE_NAMES, ADGENMetric, adgen_scores
from glm_ms.metrics.metric import HIGHER, LOSS, LOWER, TEXT, Metric
from glm_ms.metrics.perplexity import PerplexityMetric

# `metric.type` of a configuration -> class.
METRICS: dict[str, type[Metric]] = {"ADGENMetric": ADGENMetric, "PerplexityMetric": PerplexityMetric}


def score_names() -> list[str]:
    """Every score that can rank checkpoints, `checkpoint.best_metric`."""
    return list(dict.fromkeys(name for metric in METRICS.values() for name in metric.better))


def metric_of(score: str) -> str:
    """The metric that measures a score."""
    return next(name for name, metric in METRICS.items() if score in metric.better)


def takes(kind: str, metrics: Iterable[str]) -> bool:
    """Whether one of the metrics takes TEXT or LOSS."""
    return any(METRICS[name].input == kind for name in metrics)


__all__ = [
    "HIGHER",
    "LOSS",
    "LOWER",
    "METRICS",
    "SCORE_NAMES",
    "TEXT",
    "ADGENMetric",
    "Metric",
    "PerplexityMetric",
    "adgen_scores",
    "metric_of",
    "score_names",
    "takes",
]
