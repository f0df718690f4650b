"""Resuming a run: what it must share with its checkpoint, whether that is intact; moving an earlier run aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore

from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.checkpoints.manifest import (
    NO_FILES,
    Manifest,
    differences,
    read_manifest,
    verify_files,
    weights_flag,
)
from glm_ms.engine.process import Say
from glm_ms.peft import ADAPTERS
from glm_ms.settings import Settings
from glm_ms.settings.schema import quantization_of
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.fingerprint import weights_fingerprint
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.run_folder import (
    CHECKPOINTS,
    METRICS_FILE,
    RESULTS,
    list_checkpoints,
    move_aside,
    resolve_checkpoint,
)
from glm_ms.tokenizer.base import CHAT

# Keys of train_dataset that change no row; the records are compared by their SHA-256 and number.
_NO_ROWS = ("num_parallel_workers", "cache_dir", "num_samples", "drop_remainder")


def position_state(settings: Settings, plan: TrainingPlan, records: str | None = None) -> dict[str, Any]:
    """The values that a resumed run must share with the run that wrote the checkpoint; JSON.

    With equal values it continues the same loss curve to the last digit: rows and their order, network, trained
    parameters, dropout, optimizer, schedule, loss scaling. The contents of files count, not their paths; evaluation,
    saving and logging do not. `records` is the SHA-256 of rows that do not come from the file that the settings name.
    """
    whole = settings.to_dict()
    wrapper, data, pet = whole["runner_wrapper"], whole["train_dataset"], whole["model"]["pet_config"]
    loader = {key: value for key, value in data["data_loader"].items() if key != "dataset_dir"}
    adapter = ADAPTERS.get(pet["pet_type"])
    return {
        "num_rows": plan.num_rows,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "num_ranks": plan.num_ranks,
        "total_steps": plan.total_steps,
        "seed": plan.seed,
        "drop_remainder": plan.drop_remainder,
        "records": records or file_sha256(Path(settings.train_dataset.data_loader.dataset_dir)),
        "train_dataset": {**{k: v for k, v in data.items() if k not in _NO_ROWS}, "data_loader": loader},
        "tokenizer": settings.processor.tokenizer.type,
        # None, which checkpoints without this key have, is the chat template.
        "template": None if settings.processor.tokenizer.template == CHAT else settings.processor.tokenizer.template,
        "vocabulary": file_sha256(Path(settings.processor.tokenizer.vocab_file)),
        "model_config": {k: v for k, v in whole["model"]["model_config"].items() if k != "padded_vocab_size"},
        "pet_config": {key: pet[key] for key in ("pet_type", *(adapter.keys if adapter else ()))},
        # None, which checkpoints without this key have, is no quantization.
        "quantization": quantization_numbers(settings),
        # Of the frozen weights under an adapter; without one the checkpoint contains all weights.
        "base_weights": weights_fingerprint(resolve_checkpoint(settings.load_checkpoint)) if adapter else None,
        "optimizer": whole["optimizer"],
        "lr_schedule": whole["lr_schedule"],
        "max_grad_norm": wrapper["max_grad_norm"] if wrapper["use_clip_grad"] else None,
        "scale_sense": wrapper["scale_sense"] if wrapper["scale_sense"]["type"] else None,
    }


def quantization_numbers(settings: Settings) -> list[int] | None:
    """Bits and group of the frozen weights, as far as the settings choose them."""
    chosen = quantization_of(settings)
    return None if chosen is None else list(chosen.numbers)


def check_checkpoint(folder: Path, position: dict[str, Any], verify: bool = True) -> Manifest:
    """Checks that a run with this `position_state` can resume from a checkpoint, and returns its manifest.

    `verify` checks the SHA-256 of every file; one rank of a parallel run is enough.

    Raises:
        CheckpointError: it is not a training checkpoint, damaged or of another run (the message names the newest intact
            checkpoint of this run), or was made with other settings.
    """
    try:
        manifest = read_manifest(folder)
        _check_name(folder, manifest)
        if manifest.position.get("base_weights") == NO_FILES:  # version 0.4.0 for weights in folders rank_N
            position = {**position, "base_weights": NO_FILES}
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


def remark_on_versions(manifest: Manifest, device: str, say: Say) -> None:
    """Names what may change the last digits of the resumed curve: another MindSpore or kind of device."""
    now = {"mindspore": mindspore.__version__, "device": device}
    changed = differences({"mindspore": manifest.mindspore, "device": manifest.device}, now)
    if changed:
        say(f"the checkpoint is from another platform ({'; '.join(changed)}): the last digits of the losses may differ")


def check_base_stays(settings: Settings) -> None:
    """Refuses a new adapter run in the output folder of its base weights, which `set_aside` would move.

    Raises CheckpointError.
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
    """Moves the files of an earlier run to `earlier_runs/N`, and returns that folder, or None without such files.

    If the run resumes from a `checkpoint` in this folder, only later checkpoints are moved: it writes them again.
    """
    found = list_checkpoints(output_dir)
    if checkpoint is not None and checkpoint.resolve() in [path.resolve() for _, path in found]:
        later = [path for _, path in found if path.name > checkpoint.name]
        return move_aside(output_dir, later, CHECKPOINTS) if later else None
    metrics = output_dir / METRICS_FILE
    if not found and not (metrics.is_file() and metrics.stat().st_size):
        return None
    return move_aside(output_dir, [path for name in (CHECKPOINTS, *RESULTS) for path in sorted(output_dir.glob(name))])


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
