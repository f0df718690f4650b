"""Network, training step and checkpoints of a run, and how MindFormers runs them; `sharding.py` has sharded runs."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers import MindFormerConfig
from mindformers.trainer import CausalLanguageModelingTrainer
from mindspore import Parameter, Tensor, nn
from mindspore.nn import Optimizer
from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from glm_ms.engine.batches import TRAINING_COLUMNS
from glm_ms.engine.checkpoints.checkpoints import Checkpoints, WholeCheckpoints, WholeState
from glm_ms.engine.mindformers_internals import MindFormerModuleType, build_optim, build_wrapper, register_class
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.step.network import TrainingNetwork, recompute_blocks
from glm_ms.engine.step.train_step import GLMTrainOneStep, TrainOneStep
from glm_ms.engine.weights import build_model, check_vocabulary, fuse
from glm_ms.generation import GLMForCausalLM
from glm_ms.ops.registry import device
from glm_ms.parallel.partition import OPTIMIZER_SHARD_THRESHOLD_KB
from glm_ms.settings import Settings
from glm_ms.settings.optimizers import OPTIMIZERS, SCHEDULES
from glm_ms.settings.schema import LRScheduleSettings, is_sharded, rounds_products


class Training:
    """What this rank trains, in a run in which every rank has the whole network and its own rows of a batch.

    Call `build_model`, `build_network`, `build_step` and `fill` in this order.

    A given `model` is trained in place of one built from the settings.

    Attributes:
        batch_size: rows of a micro batch on each of `batch_ranks`, the ranks that take different rows.
        batch_rank: number of this rank among them.
        static_shapes: whether every batch has rows of `seq_length` tokens; else one graph takes any length.
        model, network: set by `build_model` and `build_network`.
    """

    model: GLMForCausalLM
    network: TrainingNetwork

    def __init__(self, settings: Settings, ranks: Ranks, say: Say, model: GLMForCausalLM | None = None) -> None:
        self.settings, self.ranks, self.say, self.given_model = settings, ranks, say, model
        self.checkpoint: Path | None = None
        self.batch_size = settings.runner_config.batch_size
        self.batch_ranks, self.batch_rank = ranks.size, ranks.rank
        self.static_shapes = device() == "Ascend"
        self.checkpoints: Checkpoints = WholeCheckpoints(settings, ranks.first)

    def build_model(self, vocab_size: int, checkpoint: Path | None) -> None:
        """Builds the model, unless one was given, for a tokenizer of `vocab_size`; `checkpoint` is resumed from.

        Raises as `build_model` of `glm_ms.engine.weights`.
        """
        self.checkpoint = checkpoint
        if self.given_model is not None:
            check_vocabulary(self.settings, self.say)
            self.model = self.given_model
            return
        self.model = build_model(self.settings, vocab_size, self.say, checkpoint)
        fuse(self.settings, self.model, self.say)

    def build_network(self, seq_length: int) -> TrainingNetwork:
        """The network with its loss, for rows of `seq_length` tokens."""
        bfloat16 = rounds_products(self.settings)
        if bfloat16 and self.model.quantization is not None:
            self.say("model.model_config.compute_dtype: bfloat16 has no effect on quantized layers")
        self.network = TrainingNetwork(self.model.network, seq_length, bfloat16=bfloat16)
        recompute_blocks(self.model.network, self.settings)
        return self.network

    def trained_parameters(self) -> list[Parameter]:
        """The parameters that the optimizer of this rank updates."""
        return self.network.trainable_params()

    def replicated_parameters(self) -> list[Parameter]:
        """Trained parameters that every rank has whole, and that must be equal on all."""
        return self.model.network.trainable_params()

    def build_step(self, optimizer: Optimizer) -> TrainOneStep:
        """The training step that the settings name."""
        config = {"type": self.settings.runner_wrapper.type, **step_arguments(self.settings)}
        step = build_wrapper(config, {"network": self.network, "optimizer": optimizer})
        if not self.static_shapes:
            rows = Tensor(shape=[self.batch_size, None], dtype=ms.int32)
            seeds = Tensor(shape=[self.batch_size], dtype=ms.int32)
            step.set_inputs(*[rows] * (len(TRAINING_COLUMNS) - 1), seeds)
        return step

    def fill(self, step: nn.Cell) -> None:
        """Loads the state of the checkpoint that the run resumes from. Raises CheckpointError if it does not fit."""
        # A model of `build_model` has been built with the weights of the checkpoint.
        given = self.given_model is not None
        self.checkpoints.state = WholeState(self.model, step, self.settings.load_checkpoint, restores_weights=given)
        if self.checkpoint is not None:
            self.checkpoints.restore(self.checkpoint)


class GLMTrainer(CausalLanguageModelingTrainer):
    """The task trainer that MindFormers runs, with our optimizer and training step.

    Set before `train`: `training`, and `total_steps`, the updates over which the learning rate is scheduled.
    """

    training: Training
    total_steps: int

    def create_optimizer_scheduler(self, network: nn.Cell, *_: Any, **__: Any) -> Optimizer:
        """One group of parameters: the reference decays all of them, MindFormers exempts norms and biases."""
        self.lr_scheduler = build_schedule(self.training.settings.lr_schedule, self.total_steps)
        arguments = {"params": self.training.trained_parameters(), "learning_rate": self.lr_scheduler}
        self.optimizer = build_optim(self.config.optimizer, default_args=arguments)
        return self.optimizer

    def wrap_network_with_tool_cells(self, network: nn.Cell) -> nn.Cell:
        """Unchanged: our step splits the batch and accumulates micro batches itself."""
        return network

    def create_model_wrapper(self, network: nn.Cell, optimizer: Optimizer) -> nn.Cell:
        """Our step, with all weights and states loaded."""
        step = self.training.build_step(optimizer)
        self.training.fill(step)
        return step


def register_classes(settings: Settings) -> None:
    """Enters the classes that the settings name into MindFormers' registry: optimizer, training step, trainer.

    Raises NameTakenError if another package has registered a class under one of their names.
    """
    register_class(_load(OPTIMIZERS[settings.optimizer.type]), MindFormerModuleType.OPTIMIZER)
    register_class(GLMTrainOneStep, MindFormerModuleType.WRAPPER)
    register_class(GLMTrainer, MindFormerModuleType.TRAINER)


def build_schedule(settings: LRScheduleSettings, run_steps: int) -> LearningRateSchedule:
    """The schedule of `lr_schedule`, a function of the updates made; `run_steps` replaces `total_steps: -1`."""
    values: dict[str, Any] = {"learning_rate": settings.learning_rate, "warmup_steps": settings.warmup_steps}
    values["total_steps"] = run_steps if settings.total_steps == -1 else settings.total_steps
    if settings.warmup_ratio is not None:
        values["warmup_steps"] = int(settings.warmup_ratio * values["total_steps"])
    for key in dataclasses.fields(settings):
        if settings.type in key.metadata.get("used_with", ("type", ()))[1]:
            values[key.name] = getattr(settings, key.name)
    return _load(SCHEDULES[settings.type])(**values)


def _load(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


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
