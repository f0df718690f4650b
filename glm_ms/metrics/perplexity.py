"""Perplexity over a data set, weighted by tokens."""

from __future__ import annotations

import logging
import math
from typing import Any

from glm_ms.metrics.metric import LOSS, LOWER, Metric

logger = logging.getLogger(__name__)


class PerplexityMetric(Metric):
    """exp of the mean negative log likelihood per target token.

    Batches are weighted by their tokens, so the result does not depend on the batch size. Sums are float64.
    """

    input = LOSS
    better = {"loss": LOWER, "perplexity": LOWER}  # noqa: RUF012 - declared by the base class
    headline = title = unit = "perplexity"
    plotted = ("perplexity",)

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._num_tokens = 0

    def update(self, loss_sum: float, num_tokens: int) -> None:
        """Adds a batch: the negative log likelihood in nats, summed over its target tokens, and their number, a whole
        number of any numeric type. 0 adds nothing.

        Raises:
            ValueError: `num_tokens` is negative or not whole, or is 0 and the loss is not.
        """
        total, count = float(loss_sum), int(num_tokens)
        if count < 0 or count != num_tokens:
            raise ValueError(f"num_tokens = {num_tokens}: expected a whole number, 0 or more")
        if count == 0 and total != 0:
            raise ValueError(f"loss_sum = {total} over 0 tokens: a sum without tokens must be 0")
        self._loss_sum += total
        self._num_tokens += count

    def result(self) -> dict[str, Any]:
        """Scores: "loss": mean negative log likelihood per token in nats; "perplexity": exp of it, inf beyond float64;
        "num_tokens": target tokens. A loss that is not a number stays NaN in both. Logs a warning for inf and NaN.

        Raises:
            ValueError: there is no target token.
        """
        if not self._num_tokens:
            raise ValueError("PerplexityMetric: no target tokens; the data set is empty or all its labels are ignored")
        loss = self._loss_sum / self._num_tokens
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        if not math.isfinite(perplexity):
            logger.warning("loss %s per token: perplexity is %s", loss, perplexity)
        return {"loss": loss, "perplexity": perplexity, "num_tokens": self._num_tokens}
