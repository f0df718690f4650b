"""Between two updates: evaluations, checkpoints, the best of them, plots."""

from __future__ import annotations

import time

from glm_ms.engine.checkpoints.best import BestEvaluation
from glm_ms.engine.ranks import check_equal_on_ranks
from glm_ms.engine.report.progress import ProgressLog
from glm_ms.engine.training_run import TrainingRun

# Plots older than this many seconds are drawn again after an evaluation: drawing takes one second.
_PLOT_INTERVAL = 60.0


class Milestones:
    """Called after every update; evaluates and saves when that is due.

    In a data parallel run all ranks evaluate, and check before a checkpoint that their weights are equal; then only the
    first rank writes, and the others wait for it in the next sum of gradients. In a sharded run each rank writes its
    own part.

    Args:
        run: with a model that is built.
        best: the best evaluation so far.
        log: takes scores.
    """

    def __init__(self, run: TrainingRun, best: BestEvaluation, log: ProgressLog) -> None:
        self._run, self._best, self._log = run, best, log
        settings, plan = run.settings, run.plan
        self._intervals = [settings.eval_step_interval, settings.eval_epoch_interval * plan.steps_per_epoch]
        self._plotted = time.monotonic()

    def __call__(self, step: int) -> None:
        """What is due after `step` updates: first the evaluation, because the checkpoint records its result."""
        run, checkpoints = self._run, self._run.training.checkpoints
        improved = any(self._due(step, each) for each in self._intervals) and self._evaluate(step)
        if not improved and not self._due(step, run.settings.checkpoint.save_steps):
            return
        check_equal_on_ranks(run.training.replicated_parameters(), run.ranks)
        if checkpoints.writes:
            self._log.sync()
            epoch, place = divmod(step, run.plan.steps_per_epoch)
            next_row = (epoch, place * run.plan.rows_per_step)
            checkpoints.write(step, next_row, run.position, self._best.record)
            self._best.write()
            checkpoints.remove_old(self._best.steps)

    def _due(self, step: int, interval: int | None) -> bool:
        """At every multiple, and at the end of the run."""
        return step == self._run.plan.total_steps or (interval is not None and interval > 0 and step % interval == 0)

    def _evaluate(self, step: int) -> bool:
        """Evaluates, if the run has an evaluator; whether it is the best so far, which the first rank decides."""
        run = self._run
        if run.evaluator is None:
            return False
        scores = run.evaluator(run.training.model)
        if not run.ranks.first:
            return run.ranks.from_first(None)
        self._log.evaluation(step, round(step / run.plan.steps_per_epoch, 4), scores)
        if time.monotonic() - self._plotted > _PLOT_INTERVAL:
            run.plot()
            self._plotted = time.monotonic()
        return run.ranks.from_first(self._best.improves(step, scores))
