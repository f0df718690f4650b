"""Where a training run keeps its checkpoints: `<output_dir>/checkpoint/step_00000120/`."""

from __future__ import annotations

import re
from pathlib import Path

from glm_ms.convert.errors import CheckpointError

CHECKPOINTS = "checkpoint"
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


def resolve_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint if `path` is the output folder of a run, else `path` itself.

    Raises:
        CheckpointError: there is nothing at `path`, or a run without checkpoints.
    """
    path = Path(path)
    if path.name == CHECKPOINTS and list_checkpoints(path.parent):
        path = path.parent
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a Hugging Face folder, .safetensors or .ckpt"
        )
    if not (path / CHECKPOINTS).is_dir():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"{path / CHECKPOINTS}: holds no checkpoint yet")
    return checkpoints[-1][1]
