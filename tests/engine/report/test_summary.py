"""The commands a run prints at its end work as they stand."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, REPOSITORY, SMALL_TRAINING, load_script, read_jsonl, run_here, tiny_arguments

from glm_ms.settings import load_settings

SHORT = (
    f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "eval_dataset.num_samples=3", "generation.max_new_tokens=4",
    "runner_config.max_steps=2",
)  # fmt: skip


def commands(said: str) -> dict[str, list[str]]:
    """Purpose -> command of the lines at the end of a run."""
    lines = (line.partition(": ") for line in said.splitlines() if line.startswith("to "))
    return {purpose: shlex.split(command) for purpose, _, command in lines}


@pytest.fixture(scope="module")
def base(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder whose name needs quotes."""
    return finetune(tmp_path_factory.mktemp("base run's"), "runner_config.max_steps=2")


@pytest.mark.slow
def test_an_adapter_of_a_run(
    base: Path, vocabulary: Path, finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "lora $run"
    finetune(run, *SHORT, "model.pet_config.pet_type=lora", "lr_schedule.learning_rate=0.1", "--load_checkpoint", base)
    said = capsys.readouterr().err
    assert f"LoRA adapter and training state: {run / 'checkpoint' / 'step_00000002'}" in said
    shown = commands(said)
    assert sorted(shown) == ["to evaluate", "to merge", "to predict"]
    assert [command[:2] for command in shown.values()].count(["python", "run_glm.py"]) == 2
    assert run_here(shown["to evaluate"][2:]) == 0
    scores = json.loads((run / "eval_scores.json").read_text())
    assert scores["num_samples"] == 3
    assert run_here(shown["to predict"][2:]) == 0
    assert [line["prompt"] for line in read_jsonl(run / "predict_results.jsonl")] == ["你好"]
    assert shown["to merge"][:2] == ["python", "tools/merge_lora.py"]
    assert load_script("tools/merge_lora.py").main(shown["to merge"][2:]) == 0
    line = tiny_arguments("eval", vocabulary, *SMALL_TRAINING, *SHORT, "--output_dir", tmp_path / "merged")
    assert run_here([*line, "--load_checkpoint", f"{run}_merged"]) == 0
    merged = json.loads((tmp_path / "merged" / "eval_scores.json").read_text())
    assert merged["loss"] == pytest.approx(scores["loss"], abs=1e-5)
    assert merged["rouge-l"] == pytest.approx(scores["rouge-l"])


@pytest.mark.slow
def test_as_typed_into_a_shell(base: Path, finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(tmp_path / "run", *SHORT)
    shown = commands(capsys.readouterr().err)
    text = shlex.join([sys.executable, *shown["to evaluate"][1:]])
    done = subprocess.run(
        ["bash", "-c", text], cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity: " in done.stdout


def summary_of(output_dir: Path, vocabulary: Path, *arguments: str) -> list[str]:
    """Lines for settings whose run has written its settings.yaml and nothing else."""
    from glm_ms.engine.report.summary import summary

    line = tiny_arguments("finetune", vocabulary, f"output_dir={output_dir}", *arguments)
    settings = load_settings(line[1], line[2:])
    (output_dir / "checkpoint" / "step_00000002").mkdir(parents=True)
    (output_dir / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    return summary(settings)


def test_lengths_that_evaluation_needs(vocabulary: Path, tmp_path: Path) -> None:
    """A training YAML may leave generation and eval_dataset as they are."""
    lines = summary_of(
        tmp_path / "run", vocabulary, "generation.max_new_tokens=500", "eval_dataset.max_target_length=900",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}"
    )  # fmt: skip
    shown = commands("\n".join(lines))
    assert "generation.max_new_tokens=64" in shown["to evaluate"]
    assert "eval_dataset.max_target_length=63" in shown["to evaluate"]
    assert not any("still needs" in line for line in lines)


def test_what_is_missing_is_said(vocabulary: Path, tmp_path: Path) -> None:
    lines = summary_of(tmp_path / "run", vocabulary, "eval_dataset.data_loader.dataset_dir=")
    (line,) = (line for line in lines if line.startswith("to evaluate"))
    assert "--eval_dataset RECORDS.json" in line
    assert "still needs" in line
    assert "RECORDS.json: no such file" in line
