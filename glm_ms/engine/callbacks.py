"""The MindSpore callback of a run: what happens after every update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mindspore import RunContext
from mindspore.train.callback import Callback

from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.report.progress import ProgressLog, StepRecord
from glm_ms.engine.signals import restore_signal_handlers
from glm_ms.engine.step.loss_scale import LossScale


class UpdateCallback(Callback):
    """Counts updates, stops a run that has diverged and reports each update.

    Args:
        plan: tells micro batches from updates.
        log: bar and files.
        start_step: updates made before this process.
        seq_length: positions of a row.
        after_update: called with the step when it has been logged: evaluations, checkpoints.
        write_divergence: takes the record of a step that must be the last and the reason, writes them with the
            step's records, and returns sentences for the user: where they are, where to go on from.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        log: ProgressLog,
        start_step: int,
        seq_length: int,
        after_update: Callable[[int], None],
        write_divergence: Callable[[StepRecord, str], str],
    ) -> None:
        super().__init__()
        self._plan, self._log = plan, log
        self._start, self._tokens = start_step, plan.rows_per_step * seq_length
        self._after_update, self._write_divergence = after_update, write_divergence
        self.last: StepRecord | None = None

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Runs after every micro batch; acts after those that complete an update."""
        restore_signal_handlers()  # the data pipeline, which has started by now, replaces them
        context: Any = run_context.original_args()
        updates, rest = divmod(context.cur_step_num, self._plan.accumulation_steps)
        if rest:
            return
        scale: LossScale | None = context.train_network.loss_scale
        self.last = self._record(self._start + updates, context.net_outputs, scale)
        self._log.step(self.last)
        self._stop_if_diverged(self.last, scale)
        self._after_update(self.last.step)
        self._log.seconds()  # the time of evaluating and saving is not the next step's

    def _record(self, step: int, outputs: tuple[Any, ...], scale: LossScale | None) -> StepRecord:
        loss, norm, rate, _ = (float(value.asnumpy()) for value in outputs)
        skipped = scale is not None and scale.skipped()
        return StepRecord(
            step=step,
            epoch=round(step / self._plan.steps_per_epoch, 4),
            loss=math.nan if skipped else loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=round(self._tokens / self._log.seconds(), 1),
            overflow=None if scale is None else skipped,
            loss_scale=None if scale is None else scale.value(),
        )

    def _stop_if_diverged(self, record: StepRecord, scale: LossScale | None) -> None:
        """Raises FloatingPointError where going on would be in vain; nothing has been saved since the last good
        checkpoint."""
        if record.overflow:
            reason = scale.exhausted()
            remedy = (
                "The network has diverged, or leaves the range of float16: use bfloat16 or float32, or lower"
            )
        elif math.isfinite(record.loss) and math.isfinite(record.grad_norm):
            return
        else:
            reason = f"loss {record.loss}, gradient norm {record.grad_norm}: the run has diverged"
            remedy = "Look at the records, warm up longer, clip (runner_wrapper.use_clip_grad), or lower"
        if reason is not None:
            raise FloatingPointError(
                f"step {record.step}, learning rate {record.learning_rate:g}: {reason}. "
                f"{self._write_divergence(record, reason)} {remedy} lr_schedule.learning_rate"
            )
