"""`--run_mode train` and `finetune`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mindformers import Trainer
from mindspore.train.callback import Callback

from glm_ms.data import TrainDataset
from glm_ms.engine import process as quiet
from glm_ms.engine.batches import TrainingPlan, training_batches
from glm_ms.engine.callbacks import UpdateCallback
from glm_ms.engine.checkpoints.best import BestEvaluation
from glm_ms.engine.checkpoints.checkpoint import TrainingState, remove_old_checkpoints, save_checkpoint
from glm_ms.engine.checkpoints.manifest import Manifest, write_manifest
from glm_ms.engine.checkpoints.position import position_state
from glm_ms.engine.checkpoints.resume import (
    check_base_stays,
    check_checkpoint,
    find_checkpoint,
    remark_on_versions,
    set_aside,
)
from glm_ms.engine.dataset_rows import DatasetRows
from glm_ms.engine.divergence import write_divergence
from glm_ms.engine.evaluate import Evaluator
from glm_ms.engine.milestones import Milestones
from glm_ms.engine.ranks import Ranks, check_equal_on_ranks, ranks_of
from glm_ms.engine.records import labelled_rows
from glm_ms.engine.report.progress import ProgressLog, StepRecord
from glm_ms.engine.step.network import TrainingNetwork, recompute_blocks
from glm_ms.engine.step.sharding import Sharding
from glm_ms.engine.step.trainer import GLMTrainer
from glm_ms.engine.step.trainer_config import mindformers_config
from glm_ms.engine.weights import build_model, build_unfilled_model, fuse
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.lock import run_lock
from glm_ms.storage.run_folder import SETTINGS_FILE, list_checkpoints
from glm_ms.tokenizer import SentencePieceTokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Given:
    """Objects of a caller in place of what the settings name.

    Attributes:
        model: with its weights and adapter; it is trained itself.
        rows: training rows, in place of the file of `train_dataset`.
        callbacks: called after ours.
    """

    model: GLMForCausalLM | None = None
    rows: DatasetRows | None = None
    callbacks: tuple[Callback, ...] = ()


def train(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, given: Given | None = None
) -> StepRecord | None:
    """Trains a network as the settings say, through the MindFormers Trainer.

    Args:
        settings: a checked configuration.
        tokenizer: of the records.
        say: takes lines for the user.
        given: what the caller hands over.

    Returns:
        The record of the last update; None if a resumed run had nothing left to do.

    Raises:
        CheckpointError, DataError, SettingsError: weights, records or settings that cannot be used.
        RankError: the ranks of a parallel run differ in them, or in the weights.
        FloatingPointError: the run has diverged.
    """
    ranks = ranks_of(settings)
    with run_lock(Path(settings.output_dir), say) if ranks.first else nullcontext():
        run = _prepare(settings, tokenizer, say, ranks, given or Given())
        if run.start == run.plan.total_steps:
            return None
        return _train(run)


@dataclass(frozen=True)
class _Run:
    """What is known before anything is built or written."""

    settings: Settings
    tokenizer: SentencePieceTokenizer
    say: Say
    ranks: Ranks
    rows: TrainDataset | DatasetRows
    plan: TrainingPlan
    position: dict
    checkpoint: Path | None
    manifest: Manifest | None
    evaluator: Evaluator | None
    given: Given
    sharding: Sharding | None

    @property
    def start(self) -> int:
        """Updates already made."""
        return 0 if self.manifest is None else self.manifest.step

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def own_dir(self) -> Path:
        """Where this rank's checkpoints lie."""
        return self.output_dir if self.sharding is None else self.sharding.folder

    @property
    def writes(self) -> bool:
        """Whether this rank writes checkpoints."""
        return self.ranks.first or self.sharding is not None


def _prepare(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, ranks: Ranks, given: Given
) -> _Run:
    """Reads records and checkpoint; all that can be refused is refused here or when the model is built."""
    sharding = Sharding(settings, ranks.rank) if is_sharded(settings) else None
    checkpoint = find_checkpoint(settings) if sharding is None else sharding.find_checkpoint()
    if checkpoint is None:
        check_base_stays(settings)
    rows = labelled_rows(settings.train_dataset, tokenizer, say) if given.rows is None else given.rows
    say(rows.describe())
    plan = _plan(settings, len(rows), ranks.size, sharding)
    position = position_state(settings, plan, None if given.rows is None else given.rows.sha256)
    _remark_on_schedule(settings, plan, say)
    manifest = None
    if checkpoint is not None:
        manifest = check_checkpoint(checkpoint, position, verify=ranks.first or sharding is not None)
        say(f"resuming from {checkpoint}: {manifest.step} of {plan.total_steps} steps are done")
        remark_on_versions(manifest, settings.context.device_target, say)
    ranks.agree(
        "what is trained", {**position, "steps already made": 0 if manifest is None else manifest.step}
    )
    evaluator = Evaluator(settings, tokenizer, say, leave=False) if settings.do_eval else None
    return _Run(
        settings,
        tokenizer,
        say,
        ranks,
        rows,
        plan,
        position,
        checkpoint,
        manifest,
        evaluator,
        given,
        sharding,
    )


def _train(run: _Run) -> StepRecord:
    settings, first = run.settings, run.ranks.first
    model = _model(run)
    best = _tidy_output(run) if first else BestEvaluation(run.output_dir, None)
    if run.sharding is not None:
        set_aside(run.own_dir, run.checkpoint)
        run.ranks.from_first(None)  # strategy files of an earlier run are moved before new ones are written
    log = ProgressLog(
        run.output_dir, run.plan.total_steps, run.start, settings.logging.log_steps,
        settings.logging.tensorboard, show=first,
    )  # fmt: skip
    try:
        trainer = _trainer(run, model)
        task: GLMTrainer = trainer.trainer
        task.when_built = partial(_fill, run, model, task)
        milestones = _milestones(run, model, task, best, log)
        report = partial(_report_divergence, run)
        updates = UpdateCallback(run.plan, log, run.start, run.rows.seq_length, milestones, report)
        trainer.callbacks = [updates, *run.given.callbacks]
        trainer.train()
    finally:
        log.close()
    if first:
        _plot(run)
    return updates.last


def _model(run: _Run) -> GLMForCausalLM:
    if run.given.model is not None:
        return run.given.model
    if run.sharding is not None:
        return build_unfilled_model(run.settings, run.tokenizer.vocab_size, run.say)
    model = build_model(run.settings, run.tokenizer.vocab_size, run.say, run.checkpoint)
    fuse(run.settings, model, run.say)
    return model


def _fill(run: _Run, model: GLMForCausalLM, task: GLMTrainer) -> None:
    """Weights of a sharded run, and all that a resumed run goes on with; network and step are built."""
    if run.sharding is not None:
        run.sharding.fill(task.step, run.checkpoint, run.say)
    elif run.checkpoint is not None:
        _state(run, model, task).restore(run.checkpoint, weights=run.given.model is not None)


def _tidy_output(run: _Run) -> BestEvaluation:
    """The last act before the run writes: every check has passed."""
    aside = set_aside(run.output_dir, run.checkpoint)
    if aside is not None:
        run.say(f"what an earlier run left in {run.output_dir} has been moved to {aside}")
    replace_text(run.output_dir / SETTINGS_FILE, run.settings.to_yaml())
    known = None if run.manifest is None else run.manifest.best
    best = BestEvaluation(run.output_dir, run.settings.checkpoint.best_metric, known)
    if best.dropped:
        run.say(f"the best evaluation so far does not count on: {best.dropped}")
    if run.manifest is not None:
        best.write()
    return best


def _milestones(
    run: _Run, model: GLMForCausalLM, task: GLMTrainer, best: BestEvaluation, log: ProgressLog
) -> Callable[[int], None]:
    def save(step: int, record: dict | None) -> None:
        state = _state(run, model, task) if run.sharding is None else run.sharding.state
        epoch, place = divmod(step, run.plan.steps_per_epoch)

        def write(folder: Path) -> None:
            state.write(folder)
            where = (epoch, place * run.plan.rows_per_step)
            write_manifest(folder, step, where, run.position, record, run.settings.context.device_target)

        save_checkpoint(run.own_dir, step, write)

    keep_max = run.settings.checkpoint.keep_max
    trained = model.network.trainable_params() if run.sharding is None else ()
    return Milestones(
        run.settings,
        run.plan,
        None if run.evaluator is None else partial(run.evaluator, model),
        save,
        # Another card may still be writing the newest: one more stays, which all have.
        partial(remove_old_checkpoints, run.own_dir, keep_max + (run.sharding is not None)),
        best,
        log,
        partial(_plot, run),
        run.ranks,
        run.writes,
        lambda: check_equal_on_ranks(trained, run.ranks),
    )


def _state(run: _Run, model: GLMForCausalLM, task: GLMTrainer) -> TrainingState:
    return TrainingState(model, task.optimizer, task.loss_scale, run.settings.load_checkpoint)


def _report_divergence(run: _Run, record: StepRecord, reason: str) -> str:
    if not run.ranks.first:
        run.ranks.from_first(None)  # it ends with this process: not before the first rank has written
        return "Its records are written by the first rank."
    path = write_divergence(run.output_dir, record, reason, run.plan, run.rows, run.tokenizer)
    run.ranks.from_first(None)
    saved = [str(folder) for _, folder in list_checkpoints(run.own_dir)][-1:]
    last = f"Nothing has been saved since {saved[0]}." if saved else "No checkpoint had been saved before."
    return f"Its records: {path}. {last}"


def _plot(run: _Run) -> None:
    from glm_ms.engine.report.plots import write_plots  # matplotlib takes half a second

    write_plots(run.output_dir, run.say)


def _remark_on_schedule(settings: Settings, plan: TrainingPlan, say: Say) -> None:
    schedule = settings.lr_schedule
    if schedule.warmup_ratio is None and schedule.warmup_steps >= plan.total_steps:
        say(
            f"lr_schedule.warmup_steps = {schedule.warmup_steps}: the run has {plan.total_steps} steps, so the "
            "learning rate never reaches its top"
        )


def _trainer(run: _Run, model: GLMForCausalLM) -> Trainer:
    settings = run.settings
    workers = settings.train_dataset.num_parallel_workers
    rank = run.ranks.rank if run.sharding is None else 0
    trainer = Trainer(
        args=mindformers_config(settings, run.plan.total_steps),
        train_dataset=training_batches(run.rows, run.plan, run.start, rank, workers),
    )
    quiet.after_import()
    # Trainer takes a PreTrainedModel only; its task trainer takes any cell.
    build = TrainingNetwork if run.sharding is None else run.sharding.network
    trainer.trainer.network = build(model.network, run.rows.seq_length)
    recompute_blocks(model.network, settings)
    trainer.trainer.sharding = run.sharding
    return trainer


def _plan(settings: Settings, num_rows: int, num_ranks: int, sharding: Sharding | None) -> TrainingPlan:
    """In a sharded run every card reads the whole batch, and the strategies split it."""
    runner = settings.runner_config
    return TrainingPlan(
        num_rows=num_rows,
        batch_size=runner.batch_size if sharding is None else sharding.rows_per_step,
        accumulation_steps=runner.gradient_accumulation_steps,
        num_ranks=num_ranks if sharding is None else 1,
        epochs=runner.epochs,
        max_steps=runner.max_steps,
        seed=settings.seed,
        shuffle=settings.train_dataset.data_loader.shuffle,
        drop_remainder=settings.train_dataset.drop_remainder,
    )
