"""Scores of generated text and of language models. Needs neither MindSpore nor a device."""

from __future__ import annotations

from glm_ms.metrics.adgen import SCORE_NAMES, ADGENMetric, adgen_scores
from glm_ms.metrics.perplexity import PerplexityMetric

__all__ = ["SCORE_NAMES", "ADGENMetric", "PerplexityMetric", "adgen_scores"]
