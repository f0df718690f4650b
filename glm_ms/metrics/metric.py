"""What a metric declares and does: the interface between evaluation, settings, reports and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

TEXT, LOSS = "text", "loss"
HIGHER, LOWER = "higher", "lower"


class Metric(ABC):
    """Scores of one evaluation. An object takes the samples of one data set.

    `input` says what `update` takes. TEXT: generated texts and references, as many of each. LOSS: the summed loss of a
    batch and its number of target tokens.
    """

    input: ClassVar[str]
    better: ClassVar[Mapping[str, str]]  # score -> HIGHER or LOWER, for every score that can rank checkpoints
    headline: ClassVar[str]  # the score that the progress bar shows
    plotted: ClassVar[tuple[str, ...]]  # scores whose curves are drawn in one panel
    title: ClassVar[str]  # of the panel, as is the unit
    unit: ClassVar[str] = "score"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fills in what a metric does not declare."""
        super().__init_subclass__(**kwargs)
        defaults = {"headline": next(iter(cls.better)), "plotted": tuple(cls.better), "title": cls.__name__}
        for name, value in defaults.items():
            if not hasattr(cls, name):
                setattr(cls, name, value)

    @abstractmethod
    def update(self, *batch: Any) -> list[dict[str, float]] | None:
        """Adds a batch, see `input`. A metric of texts returns the scores of each sample."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """All scores, and the numbers of samples behind them, by name.

        Raises:
            ValueError: there is no sample.
        """
