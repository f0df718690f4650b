"""Settings of a run -> the MindFormerConfig that its Trainer reads."""

from __future__ import annotations

from typing import Any

from mindformers import MindFormerConfig

from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.engine.step.sharding import parallel_context
from glm_ms.settings import Settings


def mindformers_config(settings: Settings, total_steps: int) -> MindFormerConfig:
    """The part of the settings that MindFormers acts on.

    Weights, data, checkpoints and progress are handed to the Trainer as objects, so the keys that would make
    MindFormers build its own are set to nothing. The whole run is one MindFormers epoch (see
    `training_batches`), and accumulation happens inside our training step.

    Args:
        settings: the run.
        total_steps: updates of the whole run, over which the learning rate is scheduled.
    """
    whole = settings.to_dict()
    seq_length = settings.model.model_config.seq_length
    return MindFormerConfig(
        **{
            "seed": settings.seed,
            "output_dir": settings.output_dir,
            "run_mode": "train",
            "micro_batch_interleave_num": 1,
            "load_checkpoint": "",
            "resume_training": False,
            "use_legacy": True,
            "use_legacy_format": True,
            "use_parallel": settings.use_parallel,
            "trainer": {"type": "GLMTrainer", "model_name": "common"},
            "runner_config": {
                "epochs": 1,
                "batch_size": settings.runner_config.batch_size,
                "sink_mode": False,  # one step at a time: each has its line, its checkpoint, its place to resume
                "sink_size": -1,
                "gradient_accumulation_steps": 1,
            },
            "runner_wrapper": _wrapper(settings),
            "optimizer": whole["optimizer"],
            "lr_schedule": _schedule(whole["lr_schedule"], total_steps),
            "train_dataset": {
                "data_loader": whole["train_dataset"]["data_loader"],
                "batch_size": settings.runner_config.batch_size,
                "input_columns": list(TRAINING_COLUMNS),
            },
            "train_dataset_task": {"type": "CausalLanguageModelDataset"},
            "model": {
                "model_config": {**whole["model"]["model_config"], "seq_length": seq_length},
                "arch": whole["model"]["arch"],
            },
            "callbacks": [],
            "context": {
                key: value
                for key, value in whole["context"].items()
                if value is not None and key != "use_fused_kernels"
            },
            "parallel": parallel_context(settings),
            "parallel_config": whole["parallel_config"],
            "recompute_config": whole["recompute_config"],
            "moe_config": {},
            "monitor_config": {"monitor_on": False},
        }
    )


def _wrapper(settings: Settings) -> dict[str, Any]:
    wrapper = settings.runner_wrapper
    return {
        "type": wrapper.type,
        "max_grad_norm": wrapper.max_grad_norm if wrapper.use_clip_grad else None,
        "accumulation_steps": settings.runner_config.gradient_accumulation_steps,
        "use_parallel": settings.use_parallel,
        "loss_scale": vars(wrapper.scale_sense) if wrapper.scale_sense.type else None,
    }


def _schedule(schedule: dict[str, Any], total_steps: int) -> dict[str, Any]:
    schedule = dict(schedule)
    if schedule["total_steps"] == -1:
        schedule["total_steps"] = total_steps
    ratio = schedule.pop("warmup_ratio")
    if ratio is not None:
        schedule["warmup_steps"] = int(ratio * schedule["total_steps"])
    return schedule
