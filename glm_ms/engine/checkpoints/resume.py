"""Resuming a run: whether a checkpoint is intact and belongs to these settings; moving an earlier run aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore

from glm_ms.engine.checkpoints.manifest import Manifest, differences, read_manifest, verify_files, weights_flag
from glm_ms.settings import Settings
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import CHECKPOINTS, METRICS_FILE, RESULTS, list_checkpoints, resolve_checkpoint

EARLIER_RUNS = "earlier_runs"


def check_checkpoint(folder: Path, position: dict[str, Any], verify: bool = True) -> Manifest:
    """Checks that this run can resume from a checkpoint.

    Args:
        folder: the checkpoint.
        position: `position_state` of this run.
        verify: check the SHA-256 of every file; one rank of a parallel run is enough.

    Raises:
        CheckpointError: it is not a training checkpoint, damaged or of another run (the message names the newest intact
            checkpoint of this run), or was made with other settings.
    """
    try:
        manifest = read_manifest(folder)
        _check_name(folder, manifest)
        changed = differences(manifest.position, position)
        if not changed and verify:
            verify_files(folder, manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(folder, position)}") from None
    if changed:
        raise CheckpointError(
            f"{folder}: made by a run with other settings, so its loss curve cannot be continued "
            f"({'; '.join(changed)}); restore them, or start a new run with {weights_flag(folder)} {folder}"
        )
    return manifest


def remark_on_versions(manifest: Manifest, device: str, say: Callable[[str], None]) -> None:
    """Names what may change the last digits of the resumed curve: another MindSpore or kind of device."""
    now = {"mindspore": mindspore.__version__, "device": device}
    changed = differences({"mindspore": manifest.mindspore, "device": manifest.device}, now)
    if changed:
        say(f"the checkpoint is from another platform ({'; '.join(changed)}): the last digits of the losses may differ")


def check_base_stays(settings: Settings) -> None:
    """Refuses a new adapter run in the output folder of its base weights, which `set_aside` would move.

    Raises:
        CheckpointError: `load_checkpoint` lies in the output folder.
    """
    if settings.model.pet_config.pet_type is None or not settings.load_checkpoint:
        return
    checkpoints = (Path(settings.output_dir) / CHECKPOINTS).resolve()
    if checkpoints in resolve_checkpoint(settings.load_checkpoint).resolve().parents:
        raise CheckpointError(
            f"{settings.where('output_dir')}: output_dir: {settings.output_dir} contains the base weights of this run "
            f"(load_checkpoint: {settings.load_checkpoint}), and a new run moves the files of an earlier one; give "
            "another --output_dir"
        )


def set_aside(output_dir: Path, checkpoint: Path | None) -> Path | None:
    """Moves the files of an earlier run to `earlier_runs/N`; nothing is deleted.

    Args:
        output_dir: folder of the run.
        checkpoint: to resume from; None for a new run. If it is in this folder, only later checkpoints are moved: the
            resumed run writes them again.

    Returns:
        The new folder; None if there was nothing to move.
    """
    found = list_checkpoints(output_dir)
    if checkpoint is not None and checkpoint.resolve() in [path.resolve() for _, path in found]:
        later = [path for _, path in found if path.name > checkpoint.name]
        return _move(output_dir, later, CHECKPOINTS) if later else None
    metrics = output_dir / METRICS_FILE
    if not found and not (metrics.is_file() and metrics.stat().st_size):
        return None
    return _move(output_dir, [path for name in (CHECKPOINTS, *RESULTS) for path in sorted(output_dir.glob(name))], "")


def _move(output_dir: Path, paths: list[Path], into: str) -> Path:
    number = 1
    while (output_dir / EARLIER_RUNS / str(number)).exists():
        number += 1
    target = output_dir / EARLIER_RUNS / str(number)
    (target / into).mkdir(parents=True)
    for path in paths:
        path.rename(target / into / path.name)
    return target


def _check_name(folder: Path, manifest: Manifest) -> None:
    steps = {path.resolve(): step for step, path in list_checkpoints(folder.parent.parent)}
    step = steps.get(folder.resolve())
    if step is not None and step != manifest.step:
        raise CheckpointError(f"{folder}: contains the checkpoint of step {manifest.step}: it has been renamed")


def _offer(folder: Path, position: dict[str, Any]) -> str:
    """The remedy for an unusable checkpoint: the newest other one that is intact and belongs to this run."""
    others = [path for _, path in reversed(list_checkpoints(folder.parent.parent)) if path != folder]
    for other in others:
        try:
            manifest = read_manifest(other)
            _check_name(other, manifest)
            verify_files(other, manifest)
        except CheckpointError:
            continue
        if not differences(manifest.position, position):
            return f"; the last good checkpoint is {other}: resume with --resume_training {other}"
    return "; no other checkpoint of this run is good" if others else ""
