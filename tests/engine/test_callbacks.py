"""A run that diverges stops, and writes down with which records."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_helpers import SMALL_TRAINING, read_jsonl, run_here, tiny_arguments

from glm_ms import ChatGLM3Tokenizer
from glm_ms.storage.run_folder import list_checkpoints

DIVERGING = (
    "lr_schedule.learning_rate=1.e+18", "lr_schedule.type=ConstantWarmUpLR", "runner_wrapper.use_clip_grad=False",
    "checkpoint.save_steps=1", "runner_config.batch_size=2", "runner_config.gradient_accumulation_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def diverged(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first update throws the weights far away, so that the second step is not finite."""
    folder = tmp_path_factory.mktemp("diverged")
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *DIVERGING, "--output_dir", folder)
    assert run_here(line) == 1
    return folder


def test_nothing_is_saved_after(diverged: Path) -> None:
    """The checkpoint of the step before is there, and whole."""
    from glm_ms.engine.checkpoints.manifest import read_manifest, verify_files

    ((step, folder),) = list_checkpoints(diverged)
    assert step == 1
    verify_files(folder, read_manifest(folder))
    lines = read_jsonl(diverged / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] > 0
    assert (lines[1]["loss"], lines[1]["grad_norm"]) == (None, None)


def test_the_records_of_the_step(diverged: Path, vocabulary: Path) -> None:
    from glm_ms.data.datasets import epoch_order

    found = json.loads((diverged / "nan_step_00000002.json").read_text(encoding="utf-8"))
    assert (found["step"], found["loss"]) == (2, "nan")
    assert found["learning_rate"] == pytest.approx(1e18, rel=1e-6)
    rows = found["rows"]
    assert [row["row"] for row in rows] == epoch_order(24, 0, 0)[4:8].tolist()
    assert [row["micro_batch"] for row in rows] == [0, 0, 1, 1]
    sample = read_jsonl(Path(__file__).parents[2] / "configs" / "tiny" / "sample" / "train.json")
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    for row in rows:
        record = sample[row["row"]]
        assert record["content"] in row["text"]
        assert record["summary"] in row["text_with_loss"]
        assert record["content"] not in row["text_with_loss"]
        real = [index for index in row["input_ids"] if index != tokenizer.pad_token_id]
        assert tokenizer.decode(real) == row["text"]
        assert len(row["labels"]) == len(row["input_ids"]) == 128


def test_the_message(vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are not finite to begin with; even at the first step there are the records."""
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, *DIVERGING, "--output_dir", tmp_path, "checkpoint.save_steps=null",
        "train_dataset.num_samples=5", "train_dataset.drop_remainder=False"
    )  # fmt: skip
    assert run_here(line) == 1
    shown = capsys.readouterr().err
    assert "step 2, learning rate 1e+18: loss nan, gradient norm nan: the run has diverged" in shown
    assert f"Its records: {tmp_path / 'nan_step_00000002.json'}" in shown
    assert "No checkpoint had been saved before." in shown
    assert not list_checkpoints(tmp_path)
    found = json.loads((tmp_path / "nan_step_00000002.json").read_text(encoding="utf-8"))
    assert (len(found["rows"]), found["rows_without_loss"]) == (1, 3)


def test_a_new_run_moves_what_the_diverged_one_left(vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "nan_step_00000002.json").write_text("{}")
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, "runner_config.max_steps=1", "--output_dir", tmp_path
    )
    assert run_here(line) == 0
    moved = tmp_path / "earlier_runs" / "1"
    assert sorted(path.name for path in moved.iterdir()) == ["metrics.jsonl", "nan_step_00000002.json"]
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_tokens_of_the_other_ranks_are_not_counted() -> None:
    """Counting encodes rows. Row i has i + 1 tokens; the last step has 3 rows of 8."""
    from glm_ms.engine.batches import TrainingPlan
    from glm_ms.engine.callbacks import UpdateCallback

    read: list[int] = []

    class Rows:
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            read.append(index)
            return {"attention_mask": np.arange(16) <= index}

    def tokens(step: int, ranks: int) -> float:
        plan = TrainingPlan(11, 2, 4 // ranks, ranks, 1, None, 0, shuffle=False, drop_remainder=False)
        return UpdateCallback(SimpleNamespace(rows=Rows(), plan=plan), None, None)._tokens(step)

    assert (tokens(1, 1), tokens(2, 1)) == (sum(range(1, 9)), 9 + 10 + 11)
    assert read == list(range(11))
    read.clear()
    assert (tokens(1, 4), tokens(2, 4)) == ((1 + 2) * 4, (9 + 10) * 3 / 2)
    assert read == [0, 1, 8, 9]
