"""The MindSpore callback of a run: what happens after every update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mindspore import RunContext
from mindspore.train.callback import Callback

from glm_ms.engine.divergence import report_divergence
from glm_ms.engine.process import restore_signal_handlers
from glm_ms.engine.report.progress import ProgressLog, StepRecord
from glm_ms.engine.step.loss_scale import LossScale
from glm_ms.engine.training_run import TrainingRun


class UpdateCallback(Callback):
    """Counts updates, reports each, and stops a run that has diverged.

    Args:
        run: with its plan, rows and start.
        log: bar and files.
        after_update: called with the step after it has been logged: evaluations, checkpoints.

    Attributes:
        last: the record of the last update; None before the first.
    """

    def __init__(self, run: TrainingRun, log: ProgressLog, after_update: Callable[[int], None]) -> None:
        super().__init__()
        self._run, self._plan, self._log, self._after_update = run, run.plan, log, after_update
        self.last: StepRecord | None = None

    def on_train_step_begin(self, _: RunContext) -> None:
        """The data pipeline has replaced the handlers when it started; the first step compiles for minutes."""
        restore_signal_handlers()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Runs after every micro batch; acts after those that complete an update."""
        context: Any = run_context.original_args()
        updates, rest = divmod(context.cur_step_num, self._plan.accumulation_steps)
        if rest:
            return
        scale: LossScale | None = context.train_network.loss_scale
        self.last = self._record(self._run.start + updates, context.net_outputs, scale)
        self._log.step(self.last)
        self._stop_if_diverged(self.last, scale)
        self._after_update(self.last.step)
        self._log.seconds()  # the next step does not include the time of evaluating and saving

    def _record(self, step: int, outputs: tuple[Any, ...], scale: LossScale | None) -> StepRecord:
        loss, norm, rate, _ = (float(value.asnumpy()) for value in outputs)
        skipped = scale is not None and scale.skipped()
        tokens = self._plan.rows_per_step * self._run.rows.seq_length
        return StepRecord(
            step=step,
            epoch=round(step / self._plan.steps_per_epoch, 4),
            loss=math.nan if skipped else loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=round(tokens / self._log.seconds(), 1),
            overflow=None if scale is None else skipped,
            loss_scale=None if scale is None else scale.value(),
        )

    def _stop_if_diverged(self, record: StepRecord, scale: LossScale | None) -> None:
        """Raises FloatingPointError if the run has diverged; nothing has been saved since the last good checkpoint."""
        reason: str | None
        if scale is not None and record.overflow:
            reason = scale.exhausted()
            remedy = "The network has diverged, or leaves the range of float16: use bfloat16 or float32, or lower"
        elif math.isfinite(record.loss) and math.isfinite(record.grad_norm):
            return
        else:
            reason = f"loss {record.loss}, gradient norm {record.grad_norm}: the run has diverged"
            remedy = "Look at the records, warm up longer, clip (runner_wrapper.use_clip_grad), or lower"
        if reason is not None:
            raise FloatingPointError(
                f"step {record.step}, learning rate {record.learning_rate:g}: {reason}. "
                f"{report_divergence(self._run, record, reason)} {remedy} lr_schedule.learning_rate"
            )
