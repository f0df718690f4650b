"""The values that decide the rest of a run: with equal values it continues the same loss curve to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm_ms.engine.batches import TrainingPlan
from glm_ms.engine.checkpoints.manifest import weights_fingerprint
from glm_ms.peft import ADAPTERS
from glm_ms.settings import Settings
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.run_folder import resolve_checkpoint

# Keys of train_dataset that change no row; the records are compared by their SHA-256 and number.
_NO_ROWS = ("num_parallel_workers", "cache_dir", "num_samples", "drop_remainder")


def position_state(settings: Settings, plan: TrainingPlan, records: str | None = None) -> dict[str, Any]:
    """The values that a resumed run must share with the run that wrote the checkpoint; JSON.

    Rows and their order, network, trained parameters, dropout, optimizer, schedule, loss scaling. The contents of files
    count, not their paths; evaluation, saving and logging do not.

    Args:
        settings: of the run.
        plan: of the run.
        records: SHA-256 of the rows, if they do not come from the file that the settings name.
    """
    whole = settings.to_dict()
    wrapper = whole["runner_wrapper"]
    return {
        "num_rows": plan.num_rows,
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "num_ranks": plan.num_ranks,
        "total_steps": plan.total_steps,
        "seed": plan.seed,
        "drop_remainder": plan.drop_remainder,
        "records": records or file_sha256(Path(settings.train_dataset.data_loader.dataset_dir)),
        "train_dataset": _row_keys(whole["train_dataset"]),
        "tokenizer": settings.processor.tokenizer.type,
        "vocabulary": file_sha256(Path(settings.processor.tokenizer.vocab_file)),
        "model_config": {k: v for k, v in whole["model"]["model_config"].items() if k != "padded_vocab_size"},
        "pet_config": _pet_keys(whole["model"]["pet_config"]),
        "base_weights": _base_weights(settings),
        "optimizer": whole["optimizer"],
        "lr_schedule": whole["lr_schedule"],
        "max_grad_norm": wrapper["max_grad_norm"] if wrapper["use_clip_grad"] else None,
        "scale_sense": wrapper["scale_sense"] if wrapper["scale_sense"]["type"] else None,
    }


def _row_keys(data: dict[str, Any]) -> dict[str, Any]:
    loader = {key: value for key, value in data["data_loader"].items() if key != "dataset_dir"}
    return {**{key: value for key, value in data.items() if key not in _NO_ROWS}, "data_loader": loader}


def _pet_keys(pet: dict[str, Any]) -> dict[str, Any]:
    adapter = ADAPTERS.get(pet["pet_type"])
    return {key: pet[key] for key in ("pet_type", *(adapter.keys if adapter else ()))}


def _base_weights(settings: Settings) -> str | None:
    """Identity of the frozen weights under an adapter, see `weights_fingerprint`.

    None if all weights are trained: then the checkpoint contains them.
    """
    if settings.model.pet_config.pet_type is None:
        return None
    return weights_fingerprint(resolve_checkpoint(settings.load_checkpoint))
