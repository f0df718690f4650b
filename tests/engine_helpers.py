"""Runs of run_glm.py for tests, in this process or as one of their own, and readers of what they leave."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
TRAIN_RECORDS = CONFIGS / "tiny" / "sample" / "train.json"
DEV_RECORDS = CONFIGS / "tiny" / "sample" / "dev.json"
# A network that is compiled and trained in seconds.
SMALL_NETWORK = (
    "model.model_config.num_layers=1",
    "model.model_config.hidden_size=32",
    "model.model_config.ffn_hidden_size=48",
    "model.model_config.kv_channels=8",
)
# One that learns to write adverts within seconds.
TRAINED_NETWORK = (
    "model.model_config.num_layers=1",
    "model.model_config.hidden_size=64",
    "model.model_config.ffn_hidden_size=128",
    "model.model_config.kv_channels=16",
)
SMALL_TRAINING = (
    *SMALL_NETWORK,
    "train_dataset.num_samples=24",
    "runner_config.batch_size=4",
    "runner_config.epochs=2",
    "checkpoint.save_steps=null",
    "logging.tensorboard=False",
)


def load_script(name: str) -> ModuleType:
    """A Python file of the repository as a module."""
    path = REPOSITORY / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_small_vocabulary(folder: Path) -> Path:
    """A vocabulary of 800 pieces, trained from the sample: `tokenizer.model` in a folder."""
    tool = load_script("tools/train_vocab.py")
    path = folder / "tokenizer.model"
    texts = tool.read_texts(TRAIN_RECORDS, ["content", "summary"])
    tool.write_whole(path, tool.train_vocabulary(texts, 800))
    return path


def tiny_arguments(job: str, vocabulary: Path, *arguments: object, generation: int = 3) -> list[str]:
    """Command line of a job (finetune, eval, predict) of configs/tiny with absolute paths."""
    arguments_of_job = {
        "finetune": [f"train_dataset.data_loader.dataset_dir={TRAIN_RECORDS}"],
        "eval": [f"eval_dataset.data_loader.dataset_dir={DEV_RECORDS}"],
        "predict": [],
    }[job]
    return [
        "--config", str(CONFIGS / "tiny" / f"{job}_glm{generation}_tiny.yaml"),
        *last_of_each([f"processor.tokenizer.vocab_file={vocabulary}", *arguments_of_job, *map(str, arguments)]),
    ]  # fmt: skip


def last_of_each(arguments: list[str]) -> list[str]:
    """Arguments without those that a later one replaces: a command line may not give a flag or key twice."""
    groups: list[list[str]] = []  # of a flag and its value, or one argument
    for argument in arguments:
        if groups and groups[-1][0].startswith("--") and len(groups[-1]) == 1 and not argument.startswith("--"):
            groups[-1].append(argument)
        else:
            groups.append([argument])
    names = [group[0] if group[0].startswith("--") else group[0].partition("=")[0] for group in groups]
    kept = (group for i, group in enumerate(groups) if names[i] not in names[i + 1 :])
    return [argument for group in kept for argument in group]


def run_here(arguments: list[str]) -> int:
    """Runs run_glm.py in this process and returns its exit status. Nothing is compiled twice on import."""
    return load_script("run_glm.py").main(arguments)


def environment_of_a_user() -> dict[str, str]:
    """The environment without what the tests add to it."""
    return {name: value for name, value in os.environ.items() if name not in ("LOCAL_DEFAULT_PATH", "GLOG_v")}


def run_apart(
    arguments: list[str], cwd: Path, timeout: float = 300, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs run_glm.py as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "run_glm.py"), *arguments],
        cwd=cwd, env=environment_of_a_user(), input=stdin, capture_output=True, text=True, encoding="utf-8",
        timeout=timeout, check=False
    )  # fmt: skip


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(output_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the one number that depends on the clock."""
    lines = read_jsonl(output_dir / "metrics.jsonl")
    return [{name: line[name] for name in line if name != "tokens_per_second"} for line in lines]
