"""Two ranks of msrun against one process with the double batch; the job killed as a whole and resumed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import DEV_RECORDS, SMALL_TRAINING, curve, read_jsonl, tiny_arguments
from engine_ranks import RankJob
from tolerances import ADAPTER, GRAD_NORM, LOSS_CURVE

NUM_STEPS = 20
SAVE_STEPS = 4
TRAINING = (
    "runner_config.epochs=4", f"runner_config.max_steps={NUM_STEPS}", f"checkpoint.save_steps={SAVE_STEPS}",
    "model.model_config.hidden_dropout=0.1", "model.model_config.attention_dropout=0.1",
    "runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell",
    "do_eval=True", "eval_step_interval=5", "metric.type=PerplexityMetric", "eval_dataset.num_samples=5",
    "eval_dataset.batch_size=2", f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}",
    "checkpoint.best_metric=perplexity",
)  # fmt: skip
KINDS = {
    "full": (),
    "lora": ("model.pet_config.pet_type=lora", "model.pet_config.lora_dropout=0.2"),
    "ptuning2": ("model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=4"),
}
FILES = {
    "full": "model.safetensors",
    "lora": "adapter_model.safetensors",
    "ptuning2": "adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def base(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(tmp_path_factory.mktemp("base") / "run", "runner_config.epochs=1")


def arguments_of(kind: str, base: Path) -> list[str]:
    return [*TRAINING, *KINDS[kind], *(() if kind == "full" else ("--load_checkpoint", str(base)))]


def train(vocabulary: Path, folder: Path, *arguments: str) -> RankJob:
    """A job of two ranks with batches of 2 into `folder`/run, just started."""
    line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, "runner_config.batch_size=2", *arguments)
    return RankJob(folder, [*line, "--use_parallel", "True", "--output_dir", str(folder / "run")])


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the files of a checkpoint."""
    from glm_ms.convert.safetensors_file import SafetensorsFile

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        found.update({f"{path.name}/{name}": np.array(file.read(name)) for name in file.entries})
        file.release()
    return found


def num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_ranks_make_one_batch(vocabulary: Path, finetune, base: Path, tmp_path: Path, kind: str) -> None:
    """With dropout, loss scaling and evaluation. Equal weights on both ranks are proven by the run itself before
    every checkpoint."""
    arguments = arguments_of(kind, base)
    one = finetune(tmp_path / "one", *arguments, "runner_config.batch_size=4")
    job = train(vocabulary, tmp_path / "two", *arguments).succeed()
    run = tmp_path / "two" / "run"
    lines, others = curve(one), curve(run)
    assert len(lines) == len(others) == NUM_STEPS
    for name, tolerance in (("loss", {**LOSS_CURVE, "atol": 1e-5}), ("grad_norm", GRAD_NORM)):
        np.testing.assert_allclose(*([x[name] for x in each] for each in (others, lines)), **tolerance)
    scores = [read_jsonl(each / "eval_metrics.jsonl") for each in (run, one)]
    assert [line["step"] for line in scores[0]] == [5, 6, 10, 12, 15, 18, 20]
    np.testing.assert_allclose(*([line["loss"] for line in each] for each in scores), **LOSS_CURVE)
    last = [tensors(each / "checkpoint" / f"step_{NUM_STEPS:08d}") for each in (run, one)]
    assert last[0].keys() == last[1].keys()
    weights = [name for name in last[0] if not name.startswith("optimizer")]
    for name in weights:
        np.testing.assert_allclose(last[0][name], last[1][name], **ADAPTER, err_msg=name)
    # What the first rank alone writes is there once, and the other says nothing.
    names = [sorted(path.name for path in each.iterdir() if path.name != "log") for each in (run, one)]
    assert names[0] == names[1]
    assert "training" in job.log(0)
    assert job.log(1).strip() == ""


@pytest.mark.slow
def test_killed_job_resumes_exactly(vocabulary: Path, base: Path, tmp_path: Path) -> None:
    arguments = arguments_of("full", base)
    unbroken = train(vocabulary, tmp_path / "unbroken", *arguments).succeed().folder / "run"
    job = train(vocabulary, tmp_path / "killed", *arguments)
    run = tmp_path / "killed" / "run"
    moment = random.SystemRandom().randrange(SAVE_STEPS + 1, NUM_STEPS - 1)
    job.wait_until(lambda: num_lines(run) >= moment)
    job.kill()
    assert moment <= num_lines(run) < NUM_STEPS, "it was finished before it was killed"
    shutil.rmtree(tmp_path / "killed" / "msrun")
    again = train(vocabulary, tmp_path / "killed", *arguments, "--resume_training", "True").succeed()
    assert "resuming from" in again.log(0)
    assert curve(run) == curve(unbroken)  # to the last digit
    assert read_jsonl(run / "eval_metrics.jsonl") == read_jsonl(unbroken / "eval_metrics.jsonl")
    ends = [tensors(each / "checkpoint" / f"step_{NUM_STEPS:08d}") for each in (run, unbroken)]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name], err_msg=name)
