"""Settings of a run -> the MindFormerConfig that its Trainer reads."""

from __future__ import annotations

from typing import Any

from mindformers import MindFormerConfig

from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.parallel.partition import OPTIMIZER_SHARD_THRESHOLD_KB
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded


def mindformers_config(settings: Settings) -> MindFormerConfig:
    """The part of the settings that MindFormers acts on.

    Weights, data, schedule, checkpoints and progress are handed to the Trainer as objects, so the keys that would make
    MindFormers build its own are empty. The whole run is one MindFormers epoch (see `training_batches`), and
    accumulation happens inside our training step.
    """
    whole = settings.to_dict()
    batch_size = settings.runner_config.batch_size
    context = {k: v for k, v in whole["context"].items() if v is not None and k != "use_fused_kernels"}
    values = {
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
            "batch_size": batch_size,
            "sink_mode": False,  # so that callbacks run after every step
            "sink_size": -1,
            "gradient_accumulation_steps": 1,
        },
        "runner_wrapper": {"type": settings.runner_wrapper.type, **step_arguments(settings)},
        "optimizer": whole["optimizer"],
        "train_dataset": {
            "data_loader": whole["train_dataset"]["data_loader"],
            "batch_size": batch_size,
            "input_columns": list(TRAINING_COLUMNS),
        },
        "train_dataset_task": {"type": "CausalLanguageModelDataset"},
        "model": {name: whole["model"][name] for name in ("model_config", "arch")},
        "callbacks": [],
        "context": context,
        "parallel": parallel_context(settings),
        "parallel_config": whole["parallel_config"],
        "recompute_config": whole["recompute_config"],
        "moe_config": {},
        "monitor_config": {"monitor_on": False},
    }
    return MindFormerConfig(**values)


def step_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of `GLMTrainOneStep` besides network and optimizer."""
    wrapper = settings.runner_wrapper
    return {
        "max_grad_norm": wrapper.max_grad_norm if wrapper.use_clip_grad else None,
        "accumulation_steps": settings.runner_config.gradient_accumulation_steps,
        "use_parallel": settings.use_parallel,
        "loss_scale": vars(wrapper.scale_sense) if wrapper.scale_sense.type else None,
    }


def parallel_context(settings: Settings) -> dict[str, Any]:
    """The `parallel` section for MindFormers, which passes it to `mindspore.set_auto_parallel_context`."""
    values: dict[str, Any] = vars(settings.parallel).copy()
    if is_sharded(settings):
        values["gradients_mean"] = False  # the step divides by the labelled tokens itself
        values["parallel_optimizer_config"] = {"parallel_optimizer_threshold": OPTIMIZER_SHARD_THRESHOLD_KB}
        if settings.recompute_config.parallel_optimizer_comm_recompute:
            # MindSpore 2.9 ignores the argument of this name of `Cell.recompute`; this level does the same.
            values["parallel_optimizer_config"]["optimizer_level"] = "level3"
    return values
