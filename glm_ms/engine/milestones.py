"""Between two updates: evaluations, checkpoints, the best of them, plots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.checkpoints.best import BestEvaluation
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.report.progress import ProgressLog
from glm_ms.settings import Settings

# Plots are drawn again after an evaluation if they are older, in seconds: drawing takes one.
_PLOT_INTERVAL = 60.0


class Milestones:
    """Called after every update; evaluates and saves when that is due.

    In a data parallel run all ranks evaluate and prove before a checkpoint that their weights are equal; the first
    rank alone writes, and the others wait for it in the next sum of gradients. In a sharded run each writes its own
    part.

    Args:
        settings: `do_eval`, intervals, `checkpoint`.
        plan: length of an epoch and of the run.
        evaluate: gives the scores of the network as it stands; None: no evaluation.
        save: writes the checkpoint of a step with the record of the best evaluation.
        remove_old: removes checkpoints but the newest and those of the given steps.
        best: which evaluation was the best.
        log: takes scores.
        plot: draws the curves.
        ranks: of the run.
        writes: whether this rank saves.
        check_weights: raises where the ranks do not hold the same weights.
    """

    def __init__(
        self,
        settings: Settings,
        plan: TrainingPlan,
        evaluate: Callable[[], Mapping[str, Any]] | None,
        save: Callable[[int, dict[str, Any] | None], None],
        remove_old: Callable[[tuple[int, ...]], None],
        best: BestEvaluation,
        log: ProgressLog,
        plot: Callable[[], None],
        ranks: Ranks,
        writes: bool,
        check_weights: Callable[[], None],
    ) -> None:
        self._plan, self._evaluate, self._save, self._remove_old = plan, evaluate, save, remove_old
        self._best, self._log, self._plot = best, log, plot
        self._ranks, self._writes, self._check_weights = ranks, writes, check_weights
        self._save_steps = settings.checkpoint.save_steps
        self._intervals = [settings.eval_step_interval, settings.eval_epoch_interval * plan.steps_per_epoch]
        self._plotted = time.monotonic()

    def __call__(self, step: int) -> None:
        """What is due after `step` updates: first the evaluation, so that its checkpoint knows of it."""
        improved = self._evaluate is not None and self._evaluation_due(step) and self._run_evaluation(step)
        if improved or self._due(step, self._save_steps):
            self._check_weights()
            if not self._writes:
                return
            self._log.sync()
            self._save(step, self._best.record)
            self._best.write()
            self._remove_old(self._best.steps)

    def _evaluation_due(self, step: int) -> bool:
        return any(self._due(step, interval) for interval in self._intervals)

    def _due(self, step: int, interval: int | None) -> bool:
        """At every multiple, and at the end of the run."""
        return step == self._plan.total_steps or (bool(interval) and interval > 0 and step % interval == 0)

    def _run_evaluation(self, step: int) -> bool:
        """Whether it was the best so far, which the first rank knows."""
        scores = self._evaluate()
        if not self._ranks.first:
            return self._ranks.from_first(None)
        self._log.evaluation(step, round(step / self._plan.steps_per_epoch, 4), scores)
        if time.monotonic() - self._plotted > _PLOT_INTERVAL:
            self._plot()
            self._plotted = time.monotonic()
        return self._ranks.from_first(self._best.improves(step, scores))
