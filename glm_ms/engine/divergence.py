"""The step at which a run has diverged, written to a file with the records of that step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_ms.data.rows import IGNORED
from glm_ms.engine.report.progress import StepRecord
from glm_ms.engine.training_run import TrainingRun
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import DIVERGED, list_checkpoints
from glm_ms.tokenizer import SentencePieceTokenizer


def report_divergence(run: TrainingRun, record: StepRecord, reason: str) -> str:
    """Writes `nan_step_<step>.json`: the numbers of the step and all its rows, of all micro batches and ranks.

    All ranks call it; the first writes, and the others wait, because the process ends after it.

    Args:
        run: of the step.
        record: the step; its loss or norm is not finite, or the loss scale is exhausted.
        reason: why the run stops.

    Returns:
        Sentences for the user: which file has the records, and which checkpoint is the last.
    """
    if not run.ranks.first:
        run.ranks.from_first(None)
        return "The first rank writes its records."
    indices = run.plan.rows_of(record.step - 1).tolist()
    document = {
        **{name: _plain(value) for name, value in vars(record).items()},
        "reason": reason,
        "rows_without_loss": indices.count(-1),
        "rows": [_describe(run, place, index) for place, index in enumerate(indices) if index >= 0],
    }
    path = run.output_dir / DIVERGED.format(f"{record.step:08d}")
    replace_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    run.ranks.from_first(None)
    saved = [str(folder) for _, folder in list_checkpoints(run.training.checkpoints.folder)][-1:]
    last = f"The last checkpoint is {saved[0]}." if saved else "No checkpoint had been saved before."
    return f"Its records: {path}. {last}"


def _describe(run: TrainingRun, place: int, index: int) -> dict[str, Any]:
    row, plan = run.rows[index], run.plan
    per_rank = plan.batch_size * plan.accumulation_steps
    seen = row["input_ids"][row["attention_mask"] != 0]
    return {
        "place": place,
        "rank": place // per_rank,
        "micro_batch": place % per_rank // plan.batch_size,
        "row": index,
        "text": _text(run.tokenizer, seen),
        "text_with_loss": _text(run.tokenizer, row["labels"][row["labels"] != IGNORED]),
        **{name: row[name].tolist() for name in ("input_ids", "labels", "position_ids")},
    }


def _text(tokenizer: SentencePieceTokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """Shows special tokens, but no padding at the end."""
    kept = [int(index) for index in ids]
    while kept and kept[-1] == tokenizer.pad_token_id:
        kept.pop()
    return tokenizer.decode(kept)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
