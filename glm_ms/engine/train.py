"""`--run_mode train` and `finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers import Trainer
from mindspore import Parameter
from mindspore.communication import get_group_size, get_rank

from glm_ms.convert import CheckpointError
from glm_ms.convert.run_folder import CHECKPOINTS, list_checkpoints, resolve_checkpoint
from glm_ms.data import AdgenDataset
from glm_ms.engine.batches import TrainingPlan, training_batches
from glm_ms.engine.callbacks import UpdateCallback
from glm_ms.engine.checkpoint import read_state, restore, save_checkpoint
from glm_ms.engine.mf_config import mindformers_config
from glm_ms.engine.network import TrainingNetwork
from glm_ms.engine.progress import ProgressLog, StepRecord
from glm_ms.engine.trainer import GLMTrainer
from glm_ms.engine.weights import build_model
from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer


def train(settings: Settings, tokenizer: SentencePieceTokenizer, say: Any) -> StepRecord | None:
    """Trains a network as the settings say, through the MindFormers Trainer.

    Args:
        settings: a checked configuration with `padded_vocab_size` resolved.
        tokenizer: of the records.
        say: takes lines for the user.

    Returns:
        The record of the last update; None if a resumed run had nothing left to do.

    Raises:
        CheckpointError, DataError: weights or records that cannot be used.
    """
    output_dir = Path(settings.output_dir)
    rank, num_ranks = (get_rank(), get_group_size()) if settings.use_parallel else (0, 1)
    rows = _rows(settings, tokenizer)
    say(rows.describe())
    plan = _plan(settings, len(rows), num_ranks)
    resumed = _resume_folder(settings)
    start = 0
    if resumed is not None:
        state = read_state(resumed)
        _check_same_run(resumed, state, _position_state(settings, plan))
        start = state["step"]
        say(f"resuming from {resumed}: {start} of {plan.total_steps} steps are done")
        if start >= plan.total_steps:
            return None
    model = build_model(settings, tokenizer.vocab_size, say, checkpoint=resumed)
    network = TrainingNetwork(model.network, rows.seq_length)
    workers = settings.train_dataset.num_parallel_workers
    log = ProgressLog(
        output_dir,
        plan.total_steps,
        start,
        settings.logging.log_steps,
        settings.logging.tensorboard,
        show=rank == 0,
    )
    trainer = Trainer(
        args=mindformers_config(settings, plan.total_steps),
        train_dataset=training_batches(rows, plan, start, rank, workers),
    )
    task: GLMTrainer = trainer.trainer
    task.network = network

    def save(step: int) -> None:
        if rank == 0:
            state = {"last_loss": updates.last.loss, **_position_state(settings, plan)}
            save_checkpoint(
                output_dir,
                step,
                model.config,
                model.network.get_parameters(),
                optimizer_state(task.optimizer),
                state,
                settings.checkpoint.keep_max,
            )

    updates = UpdateCallback(plan, log, start, rows.seq_length, save, settings.checkpoint.save_steps)
    trainer.callbacks = [updates]
    if resumed is not None:
        task.when_built = lambda: restore(
            resumed, model.network.get_parameters(), optimizer_state(task.optimizer)
        )
    try:
        trainer.train()
    finally:
        log.close()
    return updates.last


def optimizer_state(optimizer: ms.nn.Optimizer) -> list[Parameter]:
    """Moments and step counter: all an optimizer owns besides the weights."""
    weights = {id(parameter) for parameter in optimizer.parameters}
    return [parameter for parameter in optimizer.get_parameters() if id(parameter) not in weights]


def _rows(settings: Settings, tokenizer: SentencePieceTokenizer) -> AdgenDataset:
    data = settings.train_dataset
    return AdgenDataset(
        data.data_loader.dataset_dir,
        tokenizer,
        data.data_loader.origin_columns,
        data.max_source_length,
        data.max_target_length,
        data.ignore_pad_token_for_loss,
        data.num_samples,
    )


def _plan(settings: Settings, num_rows: int, num_ranks: int) -> TrainingPlan:
    runner = settings.runner_config
    return TrainingPlan(
        num_rows=num_rows,
        batch_size=runner.batch_size,
        accumulation_steps=runner.gradient_accumulation_steps,
        num_ranks=num_ranks,
        epochs=runner.epochs,
        max_steps=runner.max_steps,
        seed=settings.seed,
        shuffle=settings.train_dataset.data_loader.shuffle,
        drop_remainder=settings.train_dataset.drop_remainder,
    )


def _resume_folder(settings: Settings) -> Path | None:
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


def _position_state(settings: Settings, plan: TrainingPlan) -> dict[str, Any]:
    """What decides which rows step n sees: equal numbers continue the same loss curve."""
    data = settings.train_dataset
    return {
        "num_rows": plan.num_rows,
        "rows_per_step": plan.rows_per_step,
        "seed": plan.seed,
        "shuffle": plan.shuffle,
        "drop_remainder": plan.drop_remainder,
        "max_source_length": data.max_source_length,
        "max_target_length": data.max_target_length,
        "total_steps": plan.total_steps,
    }


def _check_same_run(folder: Path, state: dict[str, Any], expected: dict[str, Any]) -> None:
    changed = [f"{k}: {state.get(k)} then, {v} now" for k, v in expected.items() if state.get(k) != v]
    if changed:
        raise CheckpointError(
            f"{folder}: made by a run with other settings, so its loss curve cannot be continued "
            f"({'; '.join(changed)}); restore them, or start a new run with --load_checkpoint {folder}"
        )
