"""Evaluation and prediction by two ranks leave the files of one process, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_helpers import DEV_RECORDS, TRAINED_NETWORK, read_jsonl, run_here, tiny_arguments
from engine_ranks import RankJob

from glm_ms.settings import SettingsError, settings_from_command_line
from glm_ms.storage.errors import DataError

PROMPTS = [record["content"] for record in read_jsonl(DEV_RECORDS)[:5]]
SAMPLING = ("generation.do_sample=True", "generation.top_k=20", "seed=3")


def compare(vocabulary: Path, tmp_path: Path, mode: str, *arguments: object) -> tuple[RankJob, Path, Path]:
    """Runs with one and with two ranks; the job and both output folders."""
    line = tiny_arguments(mode, vocabulary, *TRAINED_NETWORK, "generation.max_new_tokens=24", *arguments)
    one, two = tmp_path / "one", tmp_path / "two" / "run"
    assert run_here([*line, "--output_dir", str(one)]) == 0
    job = RankJob(tmp_path / "two", [*line, "--use_parallel", "True", "--output_dir", str(two)]).succeed()
    assert job.log(1).strip() == ""  # only the first rank speaks
    return job, one, two


@pytest.mark.slow
def test_evaluation(vocabulary: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """7 batches, the last of them short: the second rank has none in the last round."""
    job, one, two = compare(
        vocabulary, tmp_path, "eval", "--load_checkpoint", trained, "eval_dataset.num_samples=13",
        "eval_dataset.batch_size=2", "metric.type=[ADGENMetric, PerplexityMetric]", *SAMPLING
    )  # fmt: skip
    for name in ("eval_predictions.jsonl", "eval_scores.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert json.loads((two / "eval_scores.json").read_text())["num_samples"] == 13
    for line in capsys.readouterr().out.splitlines():
        assert line in job.log(0).splitlines()


@pytest.mark.slow
def test_prediction(vocabulary: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in [*PROMPTS, PROMPTS[0], PROMPTS[0]]))
    job, one, two = compare(
        vocabulary, tmp_path, "predict", "--load_checkpoint", trained, "--predict_data", file,
        "predict_batch_size=3", "generation.num_return_sequences=2", *SAMPLING
    )  # fmt: skip
    assert (one / "predict_results.jsonl").read_bytes() == (two / "predict_results.jsonl").read_bytes()
    assert capsys.readouterr().out in job.log(0)


@pytest.mark.slow
def test_one_prompt_is_streamed_by_the_first_rank(
    vocabulary: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, one, two = compare(vocabulary, tmp_path, "predict", "--load_checkpoint", trained, "--predict_data", PROMPTS[0])
    assert (one / "predict_results.jsonl").read_bytes() == (two / "predict_results.jsonl").read_bytes()
    assert capsys.readouterr().out.strip() in job.log(0)


def test_prompts_are_checked_first(vocabulary: Path, tmp_path: Path) -> None:
    from glm_ms.engine.run import _check_prompts

    files = ("--output_dir", tmp_path, "--load_checkpoint", tmp_path)
    line = tiny_arguments("predict", vocabulary, "--predict_data", "-", *files)
    settings = settings_from_command_line(line)
    _check_prompts(settings)
    settings.predict_data = str(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('"whole"\n{"prompt"\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:2: not valid JSON"):  # before the weights are loaded
        _check_prompts(settings)
    settings.use_parallel, settings.predict_data = True, "-"
    with pytest.raises(SettingsError, match=r"predict_data: -: the ranks of msrun get no standard input; put"):
        _check_prompts(settings)
