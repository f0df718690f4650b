"""A metric that only a test knows, through the command line: one class and one line in its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import DEV_RECORDS, read_jsonl

from glm_ms.metrics import LOWER, METRICS, TEXT, Metric


class LengthMetric(Metric):
    """Mean characters of the answers; a shorter answer is better."""

    input = TEXT
    better = {"characters": LOWER}  # noqa: RUF012

    def __init__(self) -> None:
        self._lengths: list[int] = []

    def update(self, predictions: list[str], references: list[str]) -> list[dict[str, float]]:
        assert len(predictions) == len(references)
        self._lengths += map(len, predictions)
        return [{"characters": float(len(text))} for text in predictions]

    def result(self) -> dict[str, Any]:
        return {"characters": sum(self._lengths) / len(self._lengths)}


def test_metric(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "LengthMetric", LengthMetric)
    run = finetune(
        tmp_path, "runner_config.max_steps=4", "do_eval=True", "eval_step_interval=1", "eval_epoch_interval=-1",
        "metric.type=[ADGENMetric,LengthMetric]", "checkpoint.best_metric=characters",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "eval_dataset.num_samples=3",
        "generation.max_new_tokens=8", "lr_schedule.learning_rate=0.05",
    )  # fmt: skip
    lines = read_jsonl(run / "eval_metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    values = [line["characters"] for line in lines]
    assert len(set(values)) > 1
    best = json.loads((run / "checkpoint" / "best.json").read_text())
    assert best == {"step": 1 + values.index(min(values)), "metric": "characters", "value": min(values)}
    predictions = read_jsonl(run / "eval_predictions.jsonl")
    assert [line["characters"] for line in predictions] == [len(line["prediction"]) for line in predictions]
    assert all("rouge-l" in line for line in predictions)
    assert (run / "plots" / "eval_scores.png").is_file()
