"""Names of the files of a run, and text files that are either old or new, never half."""

from __future__ import annotations

import os
from pathlib import Path

from glm_ms.storage.run_folder import STRATEGIES

SETTINGS_FILE = "settings.yaml"
METRICS_FILE, EVAL_METRICS_FILE, TENSORBOARD = "metrics.jsonl", "eval_metrics.jsonl", "tensorboard"
PREDICTIONS_FILE, SCORES_FILE = "eval_predictions.jsonl", "eval_scores.json"
DIVERGED = "nan_step_{}.json"  # with the step
# What training leaves in its output folder besides checkpoints, as patterns of names.
RESULTS = (
    SETTINGS_FILE, METRICS_FILE, EVAL_METRICS_FILE, TENSORBOARD, PREDICTIONS_FILE, SCORES_FILE, "plots",
    DIVERGED.format("*"), STRATEGIES,
)  # fmt: skip


def replace_text(path: Path, text: str) -> None:
    """Writes UTF-8 text beside `path` and renames it into place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
