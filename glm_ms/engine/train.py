"""`--run_mode train` and `finetune`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from mindformers import Trainer
from mindspore import Parameter
from mindspore.communication import get_group_size, get_rank
from mindspore.nn import Optimizer

from glm_ms.data import AdgenDataset
from glm_ms.engine import quiet
from glm_ms.engine.batches import TrainingPlan, labelled_rows, training_batches
from glm_ms.engine.callbacks import UpdateCallback
from glm_ms.engine.checkpoint import check_files, restore, save_checkpoint
from glm_ms.engine.files import replace_text
from glm_ms.engine.lock import run_lock
from glm_ms.engine.mf_config import mindformers_config
from glm_ms.engine.network import TrainingNetwork
from glm_ms.engine.progress import ProgressLog, StepRecord
from glm_ms.engine.resume import SETTINGS_FILE, find_checkpoint, position_state, set_aside, steps_done
from glm_ms.engine.trainer import GLMTrainer
from glm_ms.engine.weights import build_model
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer


def train(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Callable[[str], None]
) -> StepRecord | None:
    """Trains a network as the settings say, through the MindFormers Trainer.

    Args:
        settings: a checked configuration.
        tokenizer: of the records.
        say: takes lines for the user.

    Returns:
        The record of the last update; None if a resumed run had nothing left to do.

    Raises:
        CheckpointError, DataError, SettingsError: weights, records or settings that cannot be used.
    """
    rank = get_rank() if settings.use_parallel else 0
    with run_lock(Path(settings.output_dir)) if rank == 0 else nullcontext():
        return _train(settings, tokenizer, say, rank)


def _train(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Callable[[str], None], rank: int
) -> StepRecord | None:
    num_ranks = get_group_size() if settings.use_parallel else 1
    checkpoint = find_checkpoint(settings)
    rows = labelled_rows(settings.train_dataset, tokenizer)
    say(rows.describe())
    plan = _plan(settings, len(rows), num_ranks)
    position = position_state(settings, plan)
    start = 0
    _remark_on_schedule(settings, plan, say)
    if checkpoint is not None:
        check_files(checkpoint)
        start = steps_done(checkpoint, position)
        say(f"resuming from {checkpoint}: {start} of {plan.total_steps} steps are done")
        if start == plan.total_steps:
            return None
    model = build_model(settings, tokenizer.vocab_size, say, checkpoint)
    if rank == 0:
        _tidy_output(settings, checkpoint, say)
    log = _log(settings, plan, start, show=rank == 0)
    try:
        trainer = _trainer(settings, plan, model, rows, start, rank)
        task: GLMTrainer = trainer.trainer
        if checkpoint is not None:
            task.when_built = lambda: restore(checkpoint, *_parameters(model, task.optimizer))

        def save(step: int) -> None:
            if rank == 0:
                parameters = _parameters(model, task.optimizer)
                keep = settings.checkpoint.keep_max
                save_checkpoint(Path(settings.output_dir), step, model.config, *parameters, position, keep)

        updates = UpdateCallback(plan, log, start, rows.seq_length, save, settings.checkpoint.save_steps)
        trainer.callbacks = [updates]
        trainer.train()
        return updates.last
    finally:
        log.close()


def _tidy_output(settings: Settings, checkpoint: Path | None, say: Callable[[str], None]) -> None:
    """The last act before the run writes: every check has passed."""
    output_dir = Path(settings.output_dir)
    aside = set_aside(output_dir, checkpoint)
    if aside is not None:
        say(f"what an earlier run left in {output_dir} has been moved to {aside}")
    replace_text(output_dir / SETTINGS_FILE, settings.to_yaml())


def _remark_on_schedule(settings: Settings, plan: TrainingPlan, say: Callable[[str], None]) -> None:
    schedule, config = settings.lr_schedule, settings.model.model_config
    if schedule.warmup_ratio is None and schedule.warmup_steps >= plan.total_steps:
        say(
            f"lr_schedule.warmup_steps = {schedule.warmup_steps}: the run has {plan.total_steps} steps, so the "
            "learning rate never reaches its top"
        )
    if settings.resume_training is not False and (config.hidden_dropout or config.attention_dropout):
        say(
            "dropout is on: its random state is not saved, so the resumed losses differ from an unbroken run's"
        )


def _trainer(
    settings: Settings, plan: TrainingPlan, model: GLMForCausalLM, rows: AdgenDataset, start: int, rank: int
) -> Trainer:
    if settings.recompute_config.recompute:
        for layer in model.network.transformer.encoder.layers:
            layer.recompute()
    workers = settings.train_dataset.num_parallel_workers
    trainer = Trainer(
        args=mindformers_config(settings, plan.total_steps),
        train_dataset=training_batches(rows, plan, start, rank, workers),
    )
    quiet.after_import()
    # Trainer takes a PreTrainedModel only; its task trainer takes any cell.
    trainer.trainer.network = TrainingNetwork(model.network, rows.seq_length)
    return trainer


def _parameters(model: GLMForCausalLM, optimizer: Optimizer) -> tuple[list[Parameter], list[Parameter]]:
    """The weights; and the moments and step counter, which are all an optimizer owns besides them."""
    weights = list(model.network.get_parameters())
    known = {id(parameter) for parameter in weights}
    return weights, [parameter for parameter in optimizer.get_parameters() if id(parameter) not in known]


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


def _log(settings: Settings, plan: TrainingPlan, start: int, show: bool) -> ProgressLog:
    output_dir, logging = Path(settings.output_dir), settings.logging
    return ProgressLog(output_dir, plan.total_steps, start, logging.log_steps, logging.tensorboard, show)
