"""The way of a user with two cards: train on real records, lose the job, resume, evaluate, predict. Minutes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_helpers import (
    CONFIGS,
    REPOSITORY,
    SMALL_NETWORK,
    SMALL_TRAINING,
    curve,
    last_of_each,
    load_script,
    run_apart,
)
from processes import environment_of, left_of

NUM_STEPS, SAVE_STEPS = 18, 4
# From the end of a rank, or of the launcher, to the end of all processes, on a busy machine.
SECONDS_TO_END = 10.0


class Launcher:
    """scripts/msrun_launcher.sh with run_glm.py on two ranks, in a folder with a space in its name."""

    def __init__(self, folder: Path, mode: str, *arguments: object) -> None:
        self.folder = folder
        words = [f"{REPOSITORY}/run_glm.py", *words_of(mode, *arguments), "--use_parallel", "True"]
        self.process = subprocess.Popen(
            ["bash", str(REPOSITORY / "scripts" / "msrun_launcher.sh"), shlex.join(words), "2"],
            cwd=folder, env={**os.environ, "PYTHON": sys.executable, "OF_TEST": str(folder)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            start_new_session=True
        )  # fmt: skip

    def finish(self) -> str:
        """What a job that succeeds has shown."""
        shown, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, shown
        assert left_of(self.folder) == []
        return shown

    def wait_for_step(self, run: Path, step: int) -> None:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < step:
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)

    def lose_a_rank(self) -> str:
        """SIGKILL to rank 1; what the launcher says."""
        begin = time.monotonic()
        for process in left_of(self.folder):
            if environment_of(process).get("MS_NODE_ID") == "1":
                os.kill(process, signal.SIGKILL)
        shown, _ = self.process.communicate(timeout=60)
        assert time.monotonic() - begin < SECONDS_TO_END
        assert self.process.returncode == 128 + signal.SIGKILL
        assert left_of(self.folder) == []
        return shown

    def kill(self) -> None:
        """SIGKILL to the launcher and its group of processes; the ranks, in groups of their own, must end too."""
        begin = time.monotonic()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=60)
        while left_of(self.folder):
            assert time.monotonic() - begin < SECONDS_TO_END, "processes are left"
            time.sleep(0.02)


def words_of(mode: str, *arguments: object) -> list[str]:
    return ["--config", str(CONFIGS / "tiny" / f"{mode}_glm3_tiny.yaml"), *last_of_each(list(map(str, arguments)))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "two ranks").mkdir()
    return tmp_path / "two ranks"


@pytest.fixture
def vocabulary(tmp_path: Path, adgen_file: Path) -> Path:
    """3000 pieces of the real records."""
    tool = load_script("tools/train_vocab.py")
    path = tmp_path / "tokenizer.model"
    tool.write_whole(path, tool.train_vocabulary(tool.read_texts(adgen_file, ["content", "summary"]), 3000))
    return path


def train(folder: Path, vocabulary: Path, adgen_file: Path, run: Path, *arguments: object) -> Launcher:
    return Launcher(
        folder, "finetune", "--train_dataset", adgen_file, "--output_dir", run, *arguments,
        f"processor.tokenizer.vocab_file={vocabulary}", *SMALL_TRAINING, "train_dataset.num_samples=48",
        "runner_config.batch_size=2", f"runner_config.max_steps={NUM_STEPS}", f"checkpoint.save_steps={SAVE_STEPS}",
        "model.model_config.hidden_dropout=0.1"
    )  # fmt: skip


def train_with_losses(folder: Path, vocabulary: Path, adgen_file: Path, run: Path) -> None:
    """Trains, loses a rank, then everything, and ends."""
    job = train(folder, vocabulary, adgen_file, run)
    job.wait_for_step(run, SAVE_STEPS + 2)
    shown = job.lose_a_rank()
    assert "error: rank 1 was ended by signal 9" in shown
    job = train(folder, vocabulary, adgen_file, run, "--resume_training", "True")
    job.wait_for_step(run, 2 * SAVE_STEPS + 2)
    job.kill()
    assert len(curve(run)) < NUM_STEPS, "it was finished before it was killed"
    shown = train(folder, vocabulary, adgen_file, run, "--resume_training", "True").finish()
    assert f"step_{2 * SAVE_STEPS:08d}" in next(line for line in shown.split("\n") if "resuming from" in line)


@pytest.mark.slow
def test_train_lose_resume_evaluate_predict(folder: Path, vocabulary: Path, adgen_file: Path) -> None:
    unbroken, run = folder / "unbroken", folder / "run"
    train(folder, vocabulary, adgen_file, unbroken).finish()
    train_with_losses(folder, vocabulary, adgen_file, run)
    assert [line["step"] for line in curve(run)] == list(range(1, NUM_STEPS + 1))
    assert curve(run) == curve(unbroken)  # to the last digit
    last = [each / "checkpoint" / f"step_{NUM_STEPS:08d}" for each in (run, unbroken)]
    names = [sorted(path.name for path in each.glob("*.safetensors")) for each in last]
    assert "model.safetensors" in names[0]
    assert names[0] == names[1]
    for name in names[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert len(list((folder / "output" / "msrun_log" / "earlier").iterdir())) == 3

    prompts = folder / "prompts.jsonl"
    records = [json.loads(line) for line in adgen_file.read_text(encoding="utf-8").splitlines()[-5:]]
    prompts.write_text("".join(json.dumps(record["content"]) + "\n" for record in records))
    jobs = {
        "eval": ("--eval_dataset", adgen_file, "eval_dataset.num_samples=5", "eval_dataset.batch_size=2",
                 "metric.type=[ADGENMetric, PerplexityMetric]"),
        "predict": ("--predict_data", prompts, "predict_batch_size=2"),
    }  # fmt: skip
    files = {
        "eval": ("eval_scores.json", "eval_predictions.jsonl"),
        "predict": ("predict_results.jsonl",),
    }
    for mode, more in jobs.items():
        common = ("--load_checkpoint", run, *more, *SMALL_NETWORK, "generation.max_new_tokens=12",
                  f"processor.tokenizer.vocab_file={vocabulary}")  # fmt: skip
        Launcher(folder, mode, *common, "--output_dir", folder / mode).finish()
        one = run_apart(words_of(mode, *common, "--output_dir", folder / f"{mode}_one"), folder)
        assert one.returncode == 0, one.stderr
        for name in files[mode]:
            assert (folder / mode / name).read_bytes() == (folder / f"{mode}_one" / name).read_bytes(), name
    assert json.loads((folder / "eval" / "eval_scores.json").read_text())["perplexity"] > 1
    assert len((folder / "predict" / "predict_results.jsonl").read_text().splitlines()) == len(records)
