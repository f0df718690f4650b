"""The best evaluation of a run, whose checkpoint is kept besides the newest ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_ms.metrics import HIGHER, METRICS, metric_of
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import best_file, step_folder


class BestEvaluation:
    """Which evaluation was the best so far.

    The record is written into the manifest of every checkpoint, from which a resumed run reads it, and into
    `checkpoint/best.json`, to which the path `OUTPUT_DIR/checkpoint/best` refers.

    Args:
        output_dir: folder of the run.
        metric: name of the score; None: nothing is kept.
        known: the record of the checkpoint that the run resumes from. It is dropped if it has another score, or if
            its checkpoint is not in `output_dir`.

    Attributes:
        record: {"step", "metric", "value"}; None before the first finite score.
        dropped: why `known` was dropped; None if it was not.
    """

    def __init__(self, output_dir: Path, metric: str | None, known: Mapping[str, Any] | None = None) -> None:
        self._output_dir, self.metric = output_dir, metric
        self.record: dict[str, Any] | None = dict(known) if known and metric else None
        self.dropped: str | None = None
        if self.record is None:
            return
        if self.record["metric"] != metric:
            self.dropped = f"it was measured by {self.record['metric']}"
        elif not step_folder(output_dir, self.record["step"]).is_dir():
            self.dropped = f"its checkpoint, step {self.record['step']}, is not in {output_dir}"
        if self.dropped:
            self.record = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The step whose checkpoint is kept, if any."""
        return () if self.record is None else (self.record["step"],)

    def improves(self, step: int, scores: Mapping[str, Any]) -> bool:
        """Whether an evaluation is better than all before; if so, it becomes the best."""
        if self.metric is None:
            return False
        value = scores.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        if self.record is not None:
            gain = value - self.record["value"]
            if (gain if METRICS[metric_of(self.metric)].better[self.metric] == HIGHER else -gain) <= 0:
                return False
        self.record = {"step": step, "metric": self.metric, "value": value}
        return True

    def write(self) -> None:
        """Updates `best.json`; call it after the checkpoint of the record is written."""
        path = best_file(self._output_dir)
        if self.record is None:
            path.unlink(missing_ok=True)
        else:
            replace_text(path, json.dumps(self.record) + "\n")
