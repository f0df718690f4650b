"""What a run shows and writes: one bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from glm_ms.engine.files import replace_text

METRICS_FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        step: updates made, this one included.
        epoch: passes over the data, fractional.
        loss: mean over the labelled tokens of the step.
        learning_rate: of this update.
        grad_norm: global, before clipping.
        tokens_per_second: positions computed (rows x sequence length) over the wall time of the step.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


def progress_bar(total: int, description: str, unit: str, done: int = 0, show: bool = True) -> tqdm:
    """A bar on standard error; every 10 seconds where that is a file, which keeps every state of the bar."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


class ProgressLog:
    """Bar and files of a training run. With `show=False` (ranks other than the first) it does nothing.

    Args:
        output_dir: where `metrics.jsonl` and `tensorboard/` go.
        total_steps: updates of the whole run.
        start_step: updates already made; lines of later steps, left by a killed run, are dropped.
        log_steps: write a line every so many steps (and for the last one).
        tensorboard: also write event files.
        show: False for silence.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        start_step: int = 0,
        log_steps: int = 1,
        tensorboard: bool = True,
        show: bool = True,
    ) -> None:
        self._total, self._log_steps = total_steps, log_steps
        self._bar = progress_bar(total_steps, "compiling", "step", start_step, show)
        self._file = self._writer = None
        if show:
            path = output_dir / METRICS_FILE
            _drop_after(path, start_step)
            self._file = path.open("a", encoding="utf-8")
        if show and tensorboard:
            from tensorboardX import SummaryWriter  # 0.5 s to import, and not always wanted

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
        self._bar.set_postfix_str(
            f"loss {record.loss:.4f}, lr {record.learning_rate:.2e}, grad norm {record.grad_norm:.3f}, "
            f"{record.tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(1)
        if self._file is None or (record.step % self._log_steps and record.step != self._total):
            return
        values = asdict(record)
        # JSON has no NaN; a diverged run must still leave lines that every reader accepts.
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
                self._writer.add_scalar(name, values[name], record.step)

    def close(self) -> None:
        """Ends bar and files."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and a line cut short by a kill."""
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
