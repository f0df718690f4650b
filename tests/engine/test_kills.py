"""SIGKILL at 20 moments drawn by chance, in three kinds of training: every resumed run is equal to the last digit.

GLM_MS_KILL_SEED=N in the environment repeats the moments of a run, whose seed is printed.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_attempts import Attempt
from engine_helpers import DEV_RECORDS, SMALL_TRAINING, curve, read_jsonl, tiny_arguments

from glm_ms.storage.run_folder import list_checkpoints

NUM_KILLS = 20
NUM_STEPS = 24
TRAINING = (
    "runner_config.batch_size=2", "runner_config.gradient_accumulation_steps=2", "runner_config.epochs=4",
    "checkpoint.save_steps=3", "checkpoint.keep_max=2",
    "model.model_config.hidden_dropout=0.1", "model.model_config.attention_dropout=0.1",
    "runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell", "runner_wrapper.scale_sense.scale_window=5",
    # Overflows in float32, so that skipped steps are among those that are repeated.
    "runner_wrapper.scale_sense.loss_scale_value=3.e+38",
)  # fmt: skip
KINDS = {
    "full": (
        "do_eval=True", "eval_step_interval=7", "metric.type=PerplexityMetric", "eval_dataset.num_samples=4",
        f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}", "checkpoint.best_metric=perplexity",
    ),
    "lora": ("model.pet_config.pet_type=lora", "model.pet_config.lora_dropout=0.2"),
    "ptuning2": (
        "model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=4", "model.pet_config.dropout_prob=0.2",
    ),
}  # fmt: skip
# What a kill waits for, and the largest number of seconds more. Start-up: imports, compilation.
PHASES = {"start-up": 9.0, "steps": 0.6, "checkpoint": 1.6}
FILE_SECONDS, STEP_SECONDS = 0.6, 0.05


class Run:
    """A run of one kind that is killed and resumed until it is finished.

    Args:
        folder: its output folder.
        arguments: of run_glm.py.
        unbroken: the same run, never interrupted.
    """

    def __init__(self, folder: Path, arguments: list[str], unbroken: Path) -> None:
        self.folder, self.arguments, self.unbroken = folder, arguments, unbroken

    def start(self, slow: bool = True) -> Attempt:
        self.folder.mkdir(exist_ok=True)
        resumes = ["--resume_training", "True"] if list_checkpoints(self.folder) else []
        line = [*self.arguments, "--output_dir", str(self.folder), *resumes]
        return Attempt(self.folder, line, FILE_SECONDS if slow else None, STEP_SECONDS if slow else 0.0)

    def check(self) -> None:
        """Whatever is there is whole, and equal to the unbroken run as far as it goes."""
        from glm_ms.engine.checkpoints.manifest import read_manifest, verify_files

        for _, folder in list_checkpoints(self.folder):
            verify_files(folder, read_manifest(folder))
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            expected = curve(self.unbroken)[: len(whole)]
            metrics.write_text("".join(whole))
            assert curve(self.folder) == expected

    def check_finished(self) -> None:
        self.check()
        assert len(curve(self.folder)) == NUM_STEPS
        for name in ("eval_metrics.jsonl", "checkpoint/best.json"):
            files = [run / name for run in (self.folder, self.unbroken)]
            assert files[0].exists() == files[1].exists()
            if files[0].exists():
                assert read_jsonl(files[0]) == read_jsonl(files[1])
        names = [[path.name for path in sorted((run / "checkpoint").iterdir())] for run in (self.folder, self.unbroken)]
        assert names[0] == names[1]  # nothing is left over, nothing is missing
        ends = [run / "checkpoint" / f"step_{NUM_STEPS:08d}" for run in (self.folder, self.unbroken)]
        for path in ends[0].glob("*.safetensors"):
            assert path.read_bytes() == (ends[1] / path.name).read_bytes(), path


def kill(run: Run, phase: str, delay: float, lines: int) -> bool:
    """Starts or resumes a run and kills it; whether it was still running."""
    attempt = run.start()
    conditions: dict[str, Callable[[], bool]] = {
        "start-up": lambda: True,
        "steps": lambda: len(read_lines(run.folder)) > lines,
        "checkpoint": attempt.writing,
    }
    moment = None

    def due() -> bool:
        nonlocal moment
        if moment is None and conditions[phase]():
            moment = time.monotonic() + delay
        return moment is not None and time.monotonic() >= moment

    for leftover in (run.folder / "checkpoint").glob(".step_*.partial"):
        shutil.rmtree(leftover)  # that of the last kill would pass for one of this attempt
    killed = attempt.kill_when(due)
    if not killed:
        assert attempt.process.returncode == 0, attempt.said.read_text()
    return killed


def read_lines(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def runs(vocabulary: Path, finetune, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Of each kind one that begins, beside an unbroken one."""
    folder = tmp_path_factory.mktemp("kills")
    base = finetune(folder / "base", "runner_config.epochs=1")
    found = {}
    for kind, keys in KINDS.items():
        arguments = [*TRAINING, *keys, *(() if kind == "full" else ("--load_checkpoint", str(base)))]
        unbroken = finetune(folder / f"{kind}_unbroken", *arguments)
        assert any(line["overflow"] for line in curve(unbroken))
        line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, *arguments)
        found[kind] = Run(folder / kind, line, unbroken)
    return found


@pytest.mark.slow
def test_killed_at_20_moments(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("GLM_MS_KILL_SEED") or random.SystemRandom().randrange(10**6))
    say(capsys, f"\nmoments of the kills: GLM_MS_KILL_SEED={seed}")
    draw = random.Random(seed)
    kills, deck = 0, []
    while kills < NUM_KILLS:
        if not deck:  # every phase of every kind, in another order each time
            deck = [(kind, phase) for kind in KINDS for phase in PHASES]
            draw.shuffle(deck)
        kind, phase = deck.pop()
        delay, lines = draw.uniform(0, PHASES[phase]), draw.randrange(NUM_STEPS - 4)
        run = runs[kind]
        killed = kill(run, phase, delay, lines)
        run.check()
        kills += killed
        done = f"{len(read_lines(run.folder))} of {NUM_STEPS} steps"
        say(
            capsys, f"{kills:2} of {NUM_KILLS}: {kind}, {phase} + {delay:.3f} s, {done}{'' if killed else ': finished'}"
        )
        if not killed:
            run.check_finished()
            shutil.rmtree(run.folder)  # and from the start
    for run in runs.values():
        assert run.start(slow=False).wait() == 0
        run.check_finished()
    say(capsys, f"{kills} of {NUM_KILLS} kills resumed exactly")


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Shows a line also where pytest captures the output."""
    with capsys.disabled():
        print(text, flush=True)
