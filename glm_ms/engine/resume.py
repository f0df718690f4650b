"""Going on with a run: which checkpoint, and whether it belongs to these settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from glm_ms.convert import CheckpointError
from glm_ms.convert.run_folder import CHECKPOINTS, list_checkpoints, resolve_checkpoint
from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.checkpoint import read_state
from glm_ms.engine.progress import METRICS_FILE, TENSORBOARD
from glm_ms.settings import Settings

EARLIER_RUNS = "earlier_runs"
SETTINGS_FILE = "settings.yaml"


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


def set_aside(output_dir: Path, checkpoint: Path | None) -> Path | None:
    """Moves what does not belong to the run that begins to `earlier_runs/N`; nothing is deleted.

    Args:
        output_dir: folder of the run.
        checkpoint: where it goes on from; None for a new run. From a checkpoint in this very folder, only later
            checkpoints are moved: they lie on a branch that is being left.

    Returns:
        Where things went; None if there was nothing to move.
    """
    found = list_checkpoints(output_dir)
    if checkpoint is not None and checkpoint.resolve() in [path.resolve() for _, path in found]:
        later = [path for _, path in found if path.name > checkpoint.name]
        return _move(output_dir, later, CHECKPOINTS) if later else None
    if not found:
        return None
    paths = (output_dir / name for name in (CHECKPOINTS, METRICS_FILE, TENSORBOARD, SETTINGS_FILE))
    return _move(output_dir, [path for path in paths if path.exists()], "")


def _move(output_dir: Path, paths: list[Path], into: str) -> Path:
    number = 1
    while (output_dir / EARLIER_RUNS / str(number)).exists():
        number += 1
    target = output_dir / EARLIER_RUNS / str(number)
    (target / into).mkdir(parents=True)
    for path in paths:
        path.rename(target / into / path.name)
    return target


def position_state(settings: Settings, plan: TrainingPlan) -> dict[str, Any]:
    """What decides the rows and the learning rate of step n: equal values continue the same loss curve."""
    data, whole = settings.train_dataset, settings.to_dict()
    return {
        "num_rows": plan.num_rows,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "num_ranks": plan.num_ranks,
        "total_steps": plan.total_steps,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
        "drop_remainder": plan.drop_remainder,
        "records": _sha256(data.data_loader.dataset_dir),
        "origin_columns": list(data.data_loader.origin_columns),
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "ignore_pad_token_for_loss": data.ignore_pad_token_for_loss,
        "tokenizer": settings.processor.tokenizer.type,
        "vocabulary": _sha256(settings.processor.tokenizer.vocab_file),
        "model_config": {k: v for k, v in whole["model"]["model_config"].items() if k != "padded_vocab_size"},
        "optimizer": whole["optimizer"],
        "lr_schedule": whole["lr_schedule"],
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
    changed = [
        f"{name}: {then} then, {now} now"
        for key, value in expected.items()
        for name, then, now in _differences(key, state.get(key), value)
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: made by a run with other settings, so its loss curve cannot be continued "
            f"({'; '.join(changed)}); restore them, or start a new run with --load_checkpoint {folder}"
        )
    return state["step"]


def _differences(key: str, then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [(f"{key}.{k}", then.get(k), v) for k, v in now.items() if then.get(k) != v]
    return [(key, then, now)] if then != now else []


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
