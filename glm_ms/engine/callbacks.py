"""What happens after every update of a training run: its record, evaluation, checkpoint, the end if it has diverged."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import RunContext
from mindspore.train.callback import Callback

from glm_ms.data.rows import IGNORED
from glm_ms.engine.batches import TrainingPlan, TrainingRows
from glm_ms.engine.checkpoints.checkpoints import BestEvaluation
from glm_ms.engine.checkpoints.manifest import Manifest
from glm_ms.engine.evaluate import Evaluator
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import Ranks, check_equal_on_ranks
from glm_ms.engine.report.progress import ProgressLog, StepRecord
from glm_ms.engine.step.loss_scale import LossScale
from glm_ms.engine.step.training import Training
from glm_ms.program import restore_signal_handlers
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import FileError
from glm_ms.storage.run_folder import DIVERGED, list_checkpoints
from glm_ms.tokenizer import SentencePieceTokenizer

# Plots older than this many seconds are drawn again after an evaluation: drawing takes one second.
_PLOT_INTERVAL = 60.0


@dataclass(frozen=True)
class TrainingRun:
    """What is known of a training run before anything is built or written.

    Attributes:
        rows, plan: training rows, and which of them each step takes.
        position: what a resumed run must share with it, see `position_state`.
        checkpoint, manifest: the checkpoint to resume from; None for a new run.
        training: network, training step and checkpoints, not built yet.
        evaluator: of `do_eval`, or None.
    """

    settings: Settings
    tokenizer: SentencePieceTokenizer
    ranks: Ranks
    say: Say
    rows: TrainingRows
    plan: TrainingPlan
    position: dict[str, Any]
    checkpoint: Path | None
    manifest: Manifest | None
    training: Training
    evaluator: Evaluator | None

    @property
    def start(self) -> int:
        """Updates already made."""
        return 0 if self.manifest is None else self.manifest.step

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    def plot(self) -> None:
        """Draws the curves of the run."""
        from glm_ms.engine.report.plots import write_plots  # matplotlib takes half a second

        write_plots(self.output_dir, self.say)


class UpdateCallback(Callback):
    """Counts and logs updates, stops a run that has diverged, evaluates and saves when that is due.

    In a data parallel run all ranks evaluate, and check before a checkpoint that their weights are equal; then only the
    first rank writes, and the others wait for it in the next sum of gradients. In a sharded run each rank writes its
    own part. `last` is the record of the last update.
    """

    def __init__(self, run: TrainingRun, log: ProgressLog, best: BestEvaluation) -> None:
        super().__init__()
        self._run, self._plan, self._log, self._best = run, run.plan, log, best
        self._plotted = time.monotonic()
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
        self._evaluate_and_save(self.last.step)
        self._log.seconds()  # the next step does not include the time of evaluating and saving

    def _record(self, step: int, outputs: tuple[Any, ...], scale: LossScale | None) -> StepRecord:
        loss, norm, rate, _ = (float(value.asnumpy()) for value in outputs)
        skipped = scale is not None and scale.skipped()
        return StepRecord(
            step=step,
            epoch=round(step / self._plan.steps_per_epoch, 4),
            loss=math.nan if skipped else loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=round(self._tokens(step) / self._log.seconds(), 1),
            overflow=None if scale is None else skipped,
            loss_scale=None if scale is None else scale.value(),
        )

    def _tokens(self, step: int) -> float:
        """Tokens of an update that are not padding, in all micro batches and on all ranks.

        A row is encoded to count its tokens. So with several ranks those of the first one stand for all.
        """
        indices = self._plan.rows_of(step - 1)
        indices = indices[indices >= 0]
        counted = indices[: self._plan.rows_per_rank].tolist()
        tokens = sum(np.count_nonzero(self._run.rows[index]["attention_mask"]) for index in counted)
        return float(tokens) * len(indices) / len(counted)

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
                f"{_report_divergence(self._run, record, reason)} {remedy} lr_schedule.learning_rate"
            )

    def _evaluate_and_save(self, step: int) -> None:
        """What is due after `step` updates: first the evaluation, because the checkpoint records its result."""
        run, plan, checkpoints = self._run, self._plan, self._run.training.checkpoints
        settings = run.settings
        intervals = (settings.eval_step_interval, settings.eval_epoch_interval * plan.steps_per_epoch)
        improved = any(self._due(step, each) for each in intervals) and self._evaluate(step)
        if not improved and not self._due(step, settings.checkpoint.save_steps):
            return
        check_equal_on_ranks(run.training.replicated_parameters(), run.ranks)
        if checkpoints.writes:
            self._log.sync()
            epoch, place = divmod(step, plan.steps_per_epoch)
            checkpoints.write(step, (epoch, place * plan.rows_per_step), run.position, self._best.record)
            self._best.write()
            checkpoints.remove_old(self._best.steps)

    def _due(self, step: int, interval: int | None) -> bool:
        """At every multiple, and at the end of the run."""
        return step == self._plan.total_steps or (interval is not None and interval > 0 and step % interval == 0)

    def _evaluate(self, step: int) -> bool:
        """Evaluates, if the run has an evaluator; whether it is the best so far, which the first rank decides."""
        run = self._run
        if run.evaluator is None:
            return False
        scores = run.evaluator(run.training.model)
        if not run.ranks.first:
            return run.ranks.from_first(None)
        self._log.evaluation(step, round(step / self._plan.steps_per_epoch, 4), scores)
        if time.monotonic() - self._plotted > _PLOT_INTERVAL:
            run.plot()
            self._plotted = time.monotonic()
        return run.ranks.from_first(self._best.improves(step, scores))


def _report_divergence(run: TrainingRun, record: StepRecord, reason: str) -> str:
    """Writes `nan_step_<step>.json`: the numbers of the step and all its rows, of all micro batches and ranks.

    All ranks call it; the first writes, and the others wait, because the process ends after it. Returns sentences for
    the user: which file has the records, and which checkpoint is the last.
    """
    if not run.ranks.first:
        run.ranks.from_first(None)
        return "The first rank writes its records."
    indices = run.plan.rows_of(record.step - 1).tolist()
    # JSON has neither NaN nor infinity: as text.
    numbers = {k: v if v is None or math.isfinite(v) else str(v) for k, v in vars(record).items()}
    path = run.output_dir / DIVERGED.format(f"{record.step:08d}")
    records = f"Its records: {path}."
    try:
        document = {
            **numbers,
            "reason": reason,
            "rows_without_loss": indices.count(-1),
            "rows": [_describe_row(run, place, index) for place, index in enumerate(indices) if index >= 0],
        }
        replace_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    except FileError as error:  # must not hide that the run has diverged
        records = f"Its records are lost: {error}."
    run.ranks.from_first(None)
    saved = [str(folder) for _, folder in list_checkpoints(run.training.checkpoints.folder)][-1:]
    last = f"The last checkpoint is {saved[0]}." if saved else "No checkpoint had been saved before."
    return f"{records} {last}"


def _describe_row(run: TrainingRun, place: int, index: int) -> dict[str, Any]:
    row, plan = run.rows[index], run.plan

    def text(ids: np.ndarray) -> str:
        """Shows special tokens, but no padding at the end."""
        kept = [int(index) for index in ids]
        while kept and kept[-1] == run.tokenizer.pad_token_id:
            kept.pop()
        return run.tokenizer.decode(kept)

    return {
        "place": place,
        "rank": place // plan.rows_per_rank,
        "micro_batch": place % plan.rows_per_rank // plan.batch_size,
        "row": index,
        "text": text(row["input_ids"][row["attention_mask"] != 0]),
        "text_with_loss": text(row["labels"][row["labels"] != IGNORED]),
        **{name: row[name].tolist() for name in ("input_ids", "labels", "position_ids")},
    }
