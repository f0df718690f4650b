"""Where a training run keeps its checkpoints: `<output_dir>/checkpoint/step_00000120/`; a sharded run those of every
card in a folder `<output_dir>/slices/rank_N` of the same kind, and their cuts in `<output_dir>/strategy`.

`<output_dir>/checkpoint/best` stands for the one with the best evaluation, which `checkpoint/best.json` names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from glm_ms.storage.errors import CheckpointError

CHECKPOINTS = "checkpoint"
BEST = "best"
SLICES, STRATEGIES = "slices", "strategy"
_STEP = re.compile(r"step_(\d+)")


def step_folder(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint made after `step` updates."""
    return output_dir / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, oldest first. Folders only appear when they are whole."""
    found = []
    for path in (output_dir / CHECKPOINTS).glob("step_*"):
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def best_file(output_dir: Path) -> Path:
    """The file that names the best checkpoint of a run: {"step", "metric", "value"}."""
    return output_dir / CHECKPOINTS / f"{BEST}.json"


def best_checkpoint(output_dir: Path) -> Path:
    """The checkpoint with the best evaluation.

    Raises:
        CheckpointError: the run has none.
    """
    path = best_file(output_dir)
    try:
        folder = step_folder(output_dir, int(json.loads(path.read_text(encoding="utf-8"))["step"]))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; a run keeps its best checkpoint with do_eval and checkpoint.best_metric"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, it cannot be read ({error!r})") from None
    if not folder.is_dir():
        raise CheckpointError(f"{path}: names {folder}, which is missing")
    return folder


def resolve_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint if `path` is the output folder of a run, the best one if it is `checkpoint/best` of one,
    else `path` itself.

    Raises:
        CheckpointError: there is nothing at `path`, or a run without checkpoints, or one whose cards have kept slices.
    """
    path = Path(path)
    if path.name == BEST and path.parent.name == CHECKPOINTS and not path.exists():
        return best_checkpoint(path.parent.parent)
    if path.name == CHECKPOINTS and list_checkpoints(path.parent):
        path = path.parent
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a Hugging Face folder, .safetensors or .ckpt"
        )
    if not (path / CHECKPOINTS).is_dir():
        if (path / SLICES).is_dir():
            raise CheckpointError(
                f"{path}: the output of a sharded run, every card has saved its slices; merge them first: python "
                f"tools/transform_ckpt.py --src_ckpt_strategy {path / STRATEGIES} --src_ckpt_dir {path / SLICES} "
                f"--dst_ckpt_dir {path}_merged"
            )
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"{path / CHECKPOINTS}: holds no checkpoint yet")
    return checkpoints[-1][1]
