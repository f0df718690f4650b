"""Going on with a run: which checkpoint, and whether it belongs to these settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm_ms.convert import CheckpointError
from glm_ms.convert.run_folder import CHECKPOINTS, list_checkpoints, resolve_checkpoint
from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.checkpoint import read_state
from glm_ms.engine.progress import METRICS_FILE, TENSORBOARD
from glm_ms.settings import Settings

EARLIER_RUNS = "earlier_runs"


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint to go on from; None for a new run.

    Raises:
        CheckpointError: `resume_training` is set and there is no checkpoint.
    """
    if settings.resume_training is False:
        return None
    if isinstance(settings.resume_training, str):
        return resolve_checkpoint(settings.resume_training)
    output_dir = Path(settings.output_dir)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise CheckpointError(
            f"{settings.where('resume_training')}: resume_training: {output_dir / CHECKPOINTS} holds no checkpoint; "
            "give the output_dir of the run to go on with, or leave resume_training out to start anew"
        )
    return checkpoints[-1][1]


def set_aside(output_dir: Path) -> Path | None:
    """Moves what an earlier run left in the output folder to `earlier_runs/N`, so that a new run starts clean.

    Returns:
        Where it went; None if there was no checkpoint to keep.
    """
    if not list_checkpoints(output_dir):
        return None
    number = 1
    while (output_dir / EARLIER_RUNS / str(number)).exists():
        number += 1
    target = output_dir / EARLIER_RUNS / str(number)
    target.mkdir(parents=True)
    for name in (CHECKPOINTS, METRICS_FILE, TENSORBOARD):
        if (output_dir / name).exists():
            (output_dir / name).rename(target / name)
    return target


def position_state(settings: Settings, plan: TrainingPlan) -> dict[str, Any]:
    """What decides the rows and the learning rate of step n: equal values continue the same loss curve."""
    data = settings.train_dataset
    return {
        "num_rows": plan.num_rows,
        "rows_per_step": plan.rows_per_step,
        "total_steps": plan.total_steps,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
        "drop_remainder": plan.drop_remainder,
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "optimizer": settings.to_dict()["optimizer"],
        "lr_schedule": settings.to_dict()["lr_schedule"],
        "max_grad_norm": settings.runner_wrapper.max_grad_norm
        if settings.runner_wrapper.use_clip_grad
        else None,
    }


def steps_done(folder: Path, expected: dict[str, Any]) -> int:
    """Updates made when a checkpoint was written.

    Args:
        folder: the checkpoint.
        expected: `position_state` of this run.

    Raises:
        CheckpointError: it was made with other settings, so its loss curve cannot be continued.
    """
    state = read_state(folder)
    changed = [f"{k}: {state.get(k)} then, {v} now" for k, v in expected.items() if state.get(k) != v]
    if changed:
        raise CheckpointError(
            f"{folder}: made by a run with other settings, so its loss curve cannot be continued "
            f"({'; '.join(changed)}); restore them, or start a new run with --load_checkpoint {folder}"
        )
    return state["step"]
