"""Layout of the output folder of a run.

A run saves checkpoints as `<output_dir>/checkpoint/step_00000120/`. In a sharded run every rank has a folder
`<output_dir>/slices/rank_N` with the same layout, and `<output_dir>/strategy` describes how tensors are split.
`<output_dir>/checkpoint/best` is an alias, not a folder: `checkpoint/best.json` names the checkpoint with the best
evaluation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from glm_ms.spelling import tool_call
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import read_object

CHECKPOINTS = "checkpoint"
BEST = "best"
SLICES, STRATEGIES = "slices", "strategy"
OPTIMIZER = "optimizer.safetensors"  # beside weights: the state of a run, not weights
WEIGHT_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pth", ".pt")
SETTINGS_FILE = "settings.yaml"
METRICS_FILE, EVAL_METRICS_FILE, TENSORBOARD = "metrics.jsonl", "eval_metrics.jsonl", "tensorboard"
PREDICTIONS_FILE, SCORES_FILE = "eval_predictions.jsonl", "eval_scores.json"
LOSSES_FILE, ANSWERS_FILE = "eval_losses.jsonl", "predict_results.jsonl"
# Of the run mode: its settings, and what its results are made of.
MODE_SETTINGS, MODE_IDENTITY = "{}_settings.yaml", "{}_run.json"
MODE_RESULTS = {
    "eval": (PREDICTIONS_FILE, LOSSES_FILE, SCORES_FILE),
    "predict": (ANSWERS_FILE,),
    "export": ("mindir_full_checkpoint", "mindir_inc_checkpoint"),  # names of MindFormers: prefill, step
}
DIVERGED = "nan_step_{}.json"  # with the step
# What training writes besides checkpoints, as patterns of names.
RESULTS = (
    SETTINGS_FILE, METRICS_FILE, EVAL_METRICS_FILE, TENSORBOARD, *MODE_RESULTS["eval"], MODE_SETTINGS.format("eval"),
    MODE_IDENTITY.format("eval"), "plots", DIVERGED.format("*"), STRATEGIES,
)  # fmt: skip
EARLIER_RUNS = "earlier_runs"
_STEP = re.compile(r"step_(\d+)")


def step_folder(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint made after `step` updates."""
    return output_dir / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, oldest first. Every folder found is complete."""
    named = [(_STEP.fullmatch(path.name), path) for path in (output_dir / CHECKPOINTS).glob("step_*")]
    return sorted((int(match.group(1)), path) for match, path in named if match and path.is_dir())


def best_file(output_dir: Path) -> Path:
    """The file that names the best checkpoint of a run: {"step", "metric", "value"}."""
    return output_dir / CHECKPOINTS / f"{BEST}.json"


def best_checkpoint(output_dir: Path) -> Path:
    """The checkpoint with the best evaluation; raises CheckpointError if the run has none."""
    path = best_file(output_dir)
    missing = "no such file; a run keeps its best checkpoint with do_eval and checkpoint.best_metric"
    step = read_object(path, CheckpointError, missing).get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{path}: damaged: step is {step!r}, expected a whole number")
    folder = step_folder(output_dir, step)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: names {folder}, which is missing")
    return folder


def resolve_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint if `path` is the output folder of a run, the best for its `checkpoint/best`, else `path`.

    What a folder contains decides, not its name. MindFormers' output folder gives `checkpoint`, which has its rank_N.

    Raises:
        CheckpointError: `path` does not exist, has weights as well as checkpoints of a run, or is a run without
            checkpoints, or a sharded run, which has slices.
    """
    if problem := path_problem(path):
        raise CheckpointError(problem)
    path = Path(path)
    if path.name == BEST and path.parent.name == CHECKPOINTS and not path.exists():
        return best_checkpoint(path.parent.parent)
    if path.name == CHECKPOINTS and list_checkpoints(path.parent):
        path = path.parent
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give a Hugging Face folder, .safetensors or .ckpt")
    checkpoints, weights = list_checkpoints(path), _weights_in(path)
    if checkpoints and weights:
        raise CheckpointError(
            f"{path}: has weights ({weights[0].name}) and the checkpoints of a run; give {path / CHECKPOINTS} for the "
            f"newest of them, or move the folder {CHECKPOINTS} elsewhere for the weights"
        )
    if checkpoints:
        return checkpoints[-1][1]
    if weights or path.is_file():
        return path
    if list((path / SLICES).glob("rank_*")):
        raise CheckpointError(
            f"{path}: is the output of a sharded run, which has slices of every rank; merge them first: "
            f"{tool_call('transform_ckpt')} --src_ckpt_strategy {path / STRATEGIES} --src_ckpt_dir {path / SLICES} "
            f"--dst_ckpt_dir {path}_merged"
        )
    if list((path / CHECKPOINTS).glob("rank_*")) or _weights_in(path / CHECKPOINTS):
        return path / CHECKPOINTS
    if (path / CHECKPOINTS).is_dir() and not list(path.glob("rank_*")):
        raise CheckpointError(f"{path / CHECKPOINTS}: has no checkpoint yet")
    return path


def _weights_in(folder: Path) -> list[Path]:
    """The files of tensors in a folder."""
    if not folder.is_dir():
        return []
    return sorted(item for item in folder.iterdir() if item.suffix in WEIGHT_ENDINGS and item.is_file())


def move_aside(output_dir: Path, paths: Iterable[Path], into: str = "") -> Path:
    """Moves files and folders of an earlier run to `earlier_runs/N/into`; returns `earlier_runs/N`, a new folder."""
    numbered = (output_dir / EARLIER_RUNS / str(number) for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    (target / into).mkdir(parents=True)
    for path in paths:
        path.rename(target / into / path.name)
    return target
