"""The step at which a run has diverged, written to a file with the records that it was given."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm_ms.data import IGNORED, Row
from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.report.progress import StepRecord
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import DIVERGED
from glm_ms.tokenizer import SentencePieceTokenizer


class Rows(Protocol):
    """Random access to training rows."""

    def __getitem__(self, index: int) -> Row:
        """One row."""


def write_divergence(
    output_dir: Path,
    record: StepRecord,
    reason: str,
    plan: TrainingPlan,
    rows: Rows,
    tokenizer: SentencePieceTokenizer,
) -> Path:
    """Writes `nan_step_<step>.json`: the numbers of the step and every row of it, of all micro batches and ranks.

    Args:
        output_dir: folder of the run.
        record: the step; its loss or norm is not finite, or it has overflowed once too often.
        reason: why the run stops.
        plan, rows: which rows the step had.
        tokenizer: turns ids into text.

    Returns:
        The file.
    """
    values = {name: _plain(value) for name, value in vars(record).items()}
    indices = plan.rows_of(record.step - 1).tolist()
    described = [
        _describe(place, index, plan, rows, tokenizer) for place, index in enumerate(indices) if index >= 0
    ]
    path = output_dir / DIVERGED.format(f"{record.step:08d}")
    document = {**values, "reason": reason, "rows_without_loss": indices.count(-1), "rows": described}
    replace_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return path


def _describe(
    place: int, index: int, plan: TrainingPlan, rows: Rows, tokenizer: SentencePieceTokenizer
) -> dict[str, Any]:
    row = rows[index]
    per_rank = plan.batch_size * plan.accumulation_steps
    seen = row["input_ids"][row["attention_mask"] != 0]
    return {
        "place": place,
        "rank": place // per_rank,
        "micro_batch": place % per_rank // plan.batch_size,
        "row": index,
        "text": _text(tokenizer, seen),
        "text_with_loss": _text(tokenizer, row["labels"][row["labels"] != IGNORED]),
        **{name: row[name].tolist() for name in ("input_ids", "labels", "position_ids")},
    }


def _text(tokenizer: SentencePieceTokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """Special tokens are shown, padding at the end is not."""
    kept = [int(index) for index in ids]
    while kept and kept[-1] == tokenizer.pad_token_id:
        kept.pop()
    return tokenizer.decode(kept)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity, and here they are what matters."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
