"""Progress of a run: one bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glm_ms.engine.process import Say
from glm_ms.metrics import METRICS
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_bytes
from glm_ms.storage.errors import WriteError, not_written
from glm_ms.storage.growing import GrowingFile, read_lines
from glm_ms.storage.run_folder import EVAL_METRICS_FILE, METRICS_FILE, TENSORBOARD, step_folder


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        step: updates made, this one included, and those that were skipped.
        epoch: passes over the data, fractional.
        loss: mean over the labelled tokens of the step; NaN if the update was skipped.
        learning_rate: of this update.
        grad_norm: global norm before clipping.
        tokens_per_second: tokens of the step that are not padding, over its wall time.
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

    A file keeps every state of a bar: there it is updated only every 10 seconds, and not shown below another one. A
    terminal or file that takes no more text ends no run.
    """
    terminal = sys.stderr.isatty()
    hidden, interval = not show or not (leave or terminal), 0.1 if terminal else 10.0
    return tqdm(
        total=total, initial=done, desc=description, unit=unit, disable=hidden, leave=leave, dynamic_ncols=True,
        mininterval=interval, file=_StandardError()
    )  # fmt: skip


class _StandardError:
    """Standard error, for `tqdm`; what cannot be written is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class ProgressLog:
    """Bar and files of a training run. With `show=False`, on ranks other than the first, it does nothing.

    `start_step` updates of `total_steps` are already made; lines of later steps, from a killed run, are removed. `say`
    takes a line about lines that are damaged or missing. All files are written by the thread that calls: a disk that is
    full ends the run with WriteError, which every method may raise.
    """

    def __init__(self, settings: Settings, total_steps: int, start_step: int, show: bool, say: Say) -> None:
        output_dir = Path(settings.output_dir)
        self._total, self._log_steps = total_steps, settings.logging.log_steps
        self._bar = progress_bar(total_steps, "compiling", "step", start_step, show)
        self._output_dir, self._shown, self._evaluated = output_dir, "", ""
        self._file: GrowingFile | None = None
        self._evaluations: GrowingFile | None = None
        self._events: EventFile | None = None
        if show:
            steps = _drop_after(output_dir / METRICS_FILE, start_step, say)
            _drop_after(output_dir / EVAL_METRICS_FILE, start_step, say)
            own = step_folder(output_dir, start_step).is_dir()  # not of a run that began in another folder
            _tell_missing(
                output_dir / METRICS_FILE, range(1, start_step + 1 if own else 1), steps, self._log_steps, say
            )
            self._file = GrowingFile(output_dir / METRICS_FILE)
        if show and settings.logging.tensorboard:
            self._events = EventFile(output_dir / TENSORBOARD, start_step + 1)
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
        self._file.append_lines(_json_line(values))
        self._plot(record.step, {name: value for name, value in values.items() if name not in ("step", "epoch")})

    def evaluation(self, step: int, epoch: float, scores: Mapping[str, Any]) -> None:
        """Shows and writes the scores of an evaluation."""
        name = next((metric.headline for metric in METRICS.values() if metric.headline in scores), None)
        if name is not None:
            self._evaluated = f", {name} {scores[name]:.4g} at step {step}"
            self._bar.set_postfix_str(self._shown + self._evaluated)
        if self._file is None:
            return
        self._file.check()
        if self._evaluations is None:
            self._evaluations = GrowingFile(self._output_dir / EVAL_METRICS_FILE)
        self._evaluations.append_lines(_json_line({"step": step, "epoch": epoch, **scores}))
        self._plot(step, {f"eval/{name}": value for name, value in scores.items()})

    def _plot(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes finite values for TensorBoard, which takes no others."""
        if self._events is not None:
            self._events.scalars(step, {name: value for name, value in values.items() if math.isfinite(value)})

    def sync(self) -> None:
        """Forces the lines to the disk: after a power cut no checkpoint must exist without the lines before it."""
        for file in (self._file, self._evaluations):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Never raises: an error that ended the run must stay visible, and nothing is left to write."""
        for output in (self._bar, self._file, self._evaluations, self._events):
            if output is not None:
                with suppress(OSError):
                    output.close()


class EventFile:
    """A new file of scalars for TensorBoard in a folder, which is created; every event is written at once.

    The writer of tensorboardX has a thread of its own: when that cannot write, it ends, and the program waits for ever.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # takes 0.5 s, and is optional
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._checksum = Event, masked_crc32c
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(not_written(folder, error)) from error
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = GrowingFile(folder / name)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))  # later events are hidden

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes finite values by name; raises WriteError."""
        tagged = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(self._event(step=step, summary={"value": tagged}))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        head = struct.pack("<Q", len(content))
        parts = (head, struct.pack("<I", self._checksum(head)), content, struct.pack("<I", self._checksum(content)))
        self._file.append(b"".join(parts))

    def close(self) -> None:
        self._file.close()


def _json_line(values: Mapping[str, Any]) -> str:
    """null for values that are not finite: JSON has no NaN, and every reader must accept the lines."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()})


def _drop_after(path: Path, step: int, say: Say) -> set[int]:
    """Removes the lines of later steps, an incomplete last line of a killed run, and damaged lines, about which `say`
    takes a line; returns the steps that have a line."""
    lines, damaged = read_lines(path, {"step": int})
    kept = {value["step"]: line for line, value in lines if value["step"] <= step}
    if damaged:
        say(
            f"{path}: {len(damaged)} damaged lines, the first is line {damaged[0]}; their numbers are lost, and the "
            "lines are removed"
        )
    content = b"".join(kept.values())
    if path.exists() and content != path.read_bytes():
        replace_bytes(path, content)
    return set(kept)


def _tell_missing(path: Path, steps: range, found: set[int], log_steps: int, say: Say) -> None:
    missing = [step for step in steps if step % log_steps == 0 and step not in found]
    if missing:
        say(f"{path}: {len(missing)} steps before the checkpoint have no line, the first is step {missing[0]}")
