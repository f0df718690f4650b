"""What importing the package loads. Which package may import which is a contract in pyproject.toml (import-linter)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_helpers import SMALL_NETWORK, tiny_arguments, write_small_vocabulary

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = {"mindspore", "mindformers", "transformers", "torch"}
WITHOUT_MINDSPORE = ("commands", "data", "launch", "metrics", "settings", "storage", "tokenizer")


def loaded_by(statements: str) -> set[str]:
    """The heavy packages that a new process has loaded after some statements."""
    shown = f"import sys\nprint('\\nheavy', *sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{statements}\n{shown}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("\nheavy")[2].split())


def test_the_package_itself_loads_nothing_heavy():
    assert loaded_by("import glm_ms") == set()


def test_public_names_load_without_mindformers():
    assert loaded_by("import glm_ms\nfor name in glm_ms.__all__: getattr(glm_ms, name)") <= {"mindspore"}


@pytest.mark.parametrize("package", WITHOUT_MINDSPORE)
def test_package_loads_without_mindspore(package):
    assert loaded_by(f"import glm_ms.{package}") == set()


def test_runs_without_training_load_no_mindformers(tmp_path: Path) -> None:
    """Real runs, in a process of their own, whose garbage collector skips the objects of the libraries."""
    small = (*SMALL_NETWORK, "model.init=random", "load_checkpoint=null", "generation.max_new_tokens=2")
    vocabulary = write_small_vocabulary(tmp_path)
    runs = [
        tiny_arguments("predict", vocabulary, *small, "--output_dir", tmp_path / "predict"),
        tiny_arguments(
            "eval", vocabulary, *small, "--output_dir", tmp_path / "eval", "eval_dataset.num_samples=1",
            "eval_dataset.max_target_length=8",
        ),
    ]  # fmt: skip
    run = f"import gc, run_glm\nassert not any(map(run_glm.main, {json.dumps(runs)}))\nassert gc.get_freeze_count()"
    assert loaded_by(run) == {"mindspore"}
    assert (tmp_path / "predict" / "predict_results.jsonl").is_file()
    assert (tmp_path / "eval" / "eval_scores.json").is_file()


def test_chat_and_server_load_without_mindformers() -> None:
    modules = ", ".join(f"glm_ms.serve.{name}" for name in ("app", "loading", "terminal", "web_demo"))
    assert loaded_by(f"import {modules}") == {"mindspore"}
