"""Progress of a run: one bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glm_ms.metrics import METRICS
from glm_ms.settings import Settings
from glm_ms.storage.atomic import append_line, replace_text
from glm_ms.storage.run_folder import EVAL_METRICS_FILE, METRICS_FILE, TENSORBOARD


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        step: updates made, this one included, and those that were skipped.
        epoch: passes over the data, fractional.
        loss: mean over the labelled tokens of the step; NaN if the update was skipped.
        learning_rate: of this update.
        grad_norm: global norm before clipping.
        tokens_per_second: positions computed (rows x sequence length) over the wall time of the step.
        overflow: the update was skipped because of an overflow; None without loss scaling.
        loss_scale: of the next step; None without loss scaling.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    overflow: bool | None = None
    loss_scale: float | None = None


def progress_bar(total: int, description: str, unit: str, done: int = 0, show: bool = True, leave: bool = True) -> tqdm:
    """A bar on standard error, which stays visible when it is full unless it is below another one: `leave=False`.

    A file keeps every state of a bar: there it is updated only every 10 seconds, and not shown below another one.
    """
    terminal = sys.stderr.isatty()
    hidden, interval = not show or not (leave or terminal), 0.1 if terminal else 10.0
    return tqdm(
        total=total, initial=done, desc=description, unit=unit, disable=hidden, leave=leave, dynamic_ncols=True,
        mininterval=interval
    )  # fmt: skip


class ProgressLog:
    """Bar and files of a training run. With `show=False`, on ranks other than the first, it does nothing.

    `start_step` updates of `total_steps` are already made; lines of later steps, from a killed run, are removed.
    """

    def __init__(self, settings: Settings, total_steps: int, start_step: int, show: bool) -> None:
        output_dir = Path(settings.output_dir)
        self._total, self._log_steps = total_steps, settings.logging.log_steps
        self._bar = progress_bar(total_steps, "compiling", "step", start_step, show)
        self._file = self._writer = None
        self._output_dir, self._shown, self._evaluated = output_dir, "", ""
        if show:
            for name in (METRICS_FILE, EVAL_METRICS_FILE):
                _drop_after(output_dir / name, start_step)
            self._file = (output_dir / METRICS_FILE).open("a", encoding="utf-8")
        if show and settings.logging.tensorboard:
            from tensorboardX import SummaryWriter  # takes 0.5 s, and is optional

            self._writer = SummaryWriter(str(output_dir / TENSORBOARD), purge_step=start_step + 1)
        self._clock = time.perf_counter()

    def seconds(self) -> float:
        """Wall time since the last call."""
        now = time.perf_counter()
        passed, self._clock = now - self._clock, now
        return passed

    def step(self, record: StepRecord) -> None:
        """Shows and writes one update."""
        self._bar.set_description("training", refresh=False)
        loss = "overflow, update skipped" if record.overflow else f"loss {record.loss:.4f}"
        scale = "" if record.loss_scale is None else f", loss scale {record.loss_scale:g}"
        self._shown = (
            f"{loss}, lr {record.learning_rate:.2e}, grad norm {record.grad_norm:.3f}{scale}, "
            f"{record.tokens_per_second:,.0f} tokens/s"
        )
        self._bar.set_postfix_str(self._shown + self._evaluated, refresh=False)
        self._bar.update(1)
        # Every skipped step has a line: such steps are rare, and readers look for them.
        due = record.overflow or record.step % self._log_steps == 0 or record.step == self._total
        if self._file is None or not due:
            return
        values = {name: value for name, value in asdict(record).items() if value is not None}
        self._file.write(_json_line(values) + "\n")
        self._file.flush()
        self._plot(record.step, {name: value for name, value in values.items() if name not in ("step", "epoch")})

    def evaluation(self, step: int, epoch: float, scores: Mapping[str, Any]) -> None:
        """Shows and writes the scores of an evaluation."""
        name = next((metric.headline for metric in METRICS.values() if metric.headline in scores), None)
        if name is not None:
            self._evaluated = f", {name} {scores[name]:.4g} at step {step}"
            self._bar.set_postfix_str(self._shown + self._evaluated)
        if self._file is None:
            return
        append_line(self._output_dir / EVAL_METRICS_FILE, _json_line({"step": step, "epoch": epoch, **scores}))
        self._plot(step, {f"eval/{name}": value for name, value in scores.items()})

    def _plot(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes finite values for TensorBoard, which takes no others."""
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Forces the lines to the disk: after a power cut no checkpoint must exist without the lines before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        for output in (self._bar, self._file, self._writer):
            if output is not None:
                output.close()


def _json_line(values: Mapping[str, Any]) -> str:
    """null for values that are not finite: JSON has no NaN, and every reader must accept the lines."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()})


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and an incomplete last line of a killed run."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    replace_text(path, "".join(kept))
