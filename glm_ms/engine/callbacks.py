"""MindSpore callbacks of a run: progress after every update, checkpoints at their steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mindspore import RunContext
from mindspore.train.callback import Callback

from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.progress import ProgressLog, StepRecord
from glm_ms.engine.signals import restore_signal_handlers


class UpdateCallback(Callback):
    """Counts updates and reports each one.

    Args:
        plan: tells micro batches from updates.
        log: bar and files.
        start_step: updates made before this process.
        seq_length: positions of a row.
        save: called with the step when a checkpoint is due.
        save_steps: a checkpoint every so many updates; None: at the end only.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        log: ProgressLog,
        start_step: int,
        seq_length: int,
        save: Callable[[int], None],
        save_steps: int | None,
    ) -> None:
        super().__init__()
        self._plan, self._log, self._save, self._save_steps = plan, log, save, save_steps
        self._start, self._tokens = start_step, plan.rows_per_step * seq_length
        self.last: StepRecord | None = None

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Runs after every micro batch; acts after those that complete an update."""
        restore_signal_handlers()  # the data pipeline, which has started by now, replaces them
        context: Any = run_context.original_args()
        updates, rest = divmod(context.cur_step_num, self._plan.accumulation_steps)
        if rest:
            return
        step = self._start + updates
        loss, norm, rate, _ = (float(value.asnumpy()) for value in context.net_outputs)
        self.last = StepRecord(
            step=step,
            epoch=round(step / self._plan.steps_per_epoch, 4),
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=round(self._tokens / self._log.seconds(), 1),
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm} at learning rate {rate:g}: the run has diverged; "
                "nothing has been saved since. Lower lr_schedule.learning_rate, warm up longer or clip, and go on "
                "from the last checkpoint"
            )
        self._log.step(self.last)
        if step == self._plan.total_steps or (self._save_steps and step % self._save_steps == 0):
            self._save(step)
            self._log.seconds()  # the time of saving is not the next step's
