"""`--run_mode train` and `finetune`."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from mindformers import Trainer
from mindspore.train.callback import Callback, LambdaCallback

from glm_ms.engine.batches import DatasetRows, TrainingPlan, TrainingRows, training_batches
from glm_ms.engine.callbacks import TrainingRun, UpdateCallback
from glm_ms.engine.checkpoints import resume
from glm_ms.engine.checkpoints.checkpoints import BestEvaluation
from glm_ms.engine.evaluate import Evaluator
from glm_ms.engine.from_settings import labelled_rows
from glm_ms.engine.mindformers_internals import build_context, log_to_folder
from glm_ms.engine.process import Say, hidden_stdout
from glm_ms.engine.ranks import Ranks, ranks_of
from glm_ms.engine.report.progress import ProgressLog, StepRecord
from glm_ms.engine.step.sharding import ShardedTraining
from glm_ms.engine.step.training import Training, mindformers_config, register_classes
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded
from glm_ms.storage.atomic import remove_leftovers, replace_text
from glm_ms.storage.lock import run_lock
from glm_ms.storage.run_folder import CHECKPOINTS, SETTINGS_FILE, STRATEGIES
from glm_ms.tokenizer import SentencePieceTokenizer


@dataclass(frozen=True)
class Given:
    """Objects of a caller: model, with weights and adapter, and rows, in place of those of the settings; callbacks,
    which are called after those of glm_ms."""

    model: GLMForCausalLM | None = None
    rows: DatasetRows | None = None
    callbacks: tuple[Callback, ...] = ()


def set_device(settings: Settings) -> None:
    """Sets the device and connects the ranks, through the context that MindFormers has besides MindSpore's: without it
    MindFormers turns graph mode off when training begins."""
    log_to_folder(settings.output_dir)
    build_context(mindformers_config(settings))


def train(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, given: Given | None = None
) -> StepRecord | None:
    """Trains a network as the settings say, through the MindFormers Trainer; `say` takes lines for the user.

    Returns the record of the last update; None if a resumed run had nothing left to do.

    Raises:
        CheckpointError, DataError, SettingsError: weights, records or settings that cannot be used.
        RankError: the ranks of a parallel run differ in them, or in the weights.
        FloatingPointError: the run has diverged.
    """
    ranks, given = ranks_of(settings), given or Given()
    with run_lock(Path(settings.output_dir), say) if ranks.first else nullcontext():
        run = prepare(settings, tokenizer, say, ranks, given)
        if run.start == run.plan.total_steps:
            _finish_killed(run)
            return None
        run.training.build_model(tokenizer.vocab_size, run.checkpoint)
        best = begin_output(run)
        last = fit(run, best, given.callbacks)
        finish_output(run)
        return last


def prepare(settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, ranks: Ranks, given: Given) -> TrainingRun:
    """Reads records and checkpoint; what cannot be used is refused here or when the model is built."""
    kind = ShardedTraining if is_sharded(settings) else Training
    training = kind(settings, ranks, say, given.model)
    checkpoint = training.checkpoints.find()
    if checkpoint is None:
        resume.check_base_stays(settings)
    rows: TrainingRows = given.rows or labelled_rows(settings.train_dataset, tokenizer, say)
    say(rows.describe())
    plan = _plan(settings, len(rows), training, say)
    position = resume.position_state(settings, plan, None if given.rows is None else given.rows.sha256)
    manifest = None
    if checkpoint is not None:
        manifest = resume.check_checkpoint(checkpoint, position, verify=training.checkpoints.writes)
        say(f"resuming from {checkpoint}: {manifest.step} of {plan.total_steps} steps are done")
        resume.remark_on_versions(manifest, settings.context.device_target, say)
    done = 0 if manifest is None else manifest.step
    ranks.agree("run to train", {**position, "steps already made": done})
    return TrainingRun(
        settings=settings,
        tokenizer=tokenizer,
        ranks=ranks,
        say=say,
        rows=rows,
        plan=plan,
        position=position,
        checkpoint=checkpoint,
        manifest=manifest,
        training=training,
        evaluator=Evaluator(settings, tokenizer, say, leave=False) if settings.do_eval else None,
    )


def begin_output(run: TrainingRun) -> BestEvaluation:
    """Prepares the output folder, after every check has passed: moves an earlier run aside, writes the settings, and
    finishes what a killed run was about to do after its last checkpoint: the name of the best one, removal of old ones.
    """
    known = None if run.manifest is None else run.manifest.best
    metric = run.settings.checkpoint.best_metric if run.ranks.first else None
    best = BestEvaluation(run.output_dir, metric, known, run.say)
    own = run.training.checkpoints.folder
    if run.training.checkpoints.writes:
        remove_leftovers(own / CHECKPOINTS)  # half written or half removed by a killed run
    if run.ranks.first:
        remove_leftovers(run.output_dir)
        aside = resume.set_aside(run.output_dir, run.checkpoint)
        if aside is not None:
            run.say(f"the files of an earlier run in {run.output_dir} have been moved to {aside}")
        replace_text(run.output_dir / SETTINGS_FILE, run.settings.to_yaml())
        if run.manifest is not None:
            best.write()
    if own != run.output_dir:
        resume.set_aside(own, run.checkpoint)
        own.mkdir(parents=True, exist_ok=True)
        run.ranks.from_first(None)  # no rank writes a strategy file before those of an earlier run are moved
    if run.manifest is not None and run.training.checkpoints.writes:
        run.training.checkpoints.remove_old(best.steps)
    return best


def fit(run: TrainingRun, best: BestEvaluation, callbacks: tuple[Callback, ...]) -> StepRecord | None:
    """Builds network, optimizer and training step, and makes all updates that are left; returns the last record."""
    settings, training = run.settings, run.training
    log = ProgressLog(settings, run.plan.total_steps, run.start, run.ranks.first, run.say)
    try:
        register_classes(settings)
        log_to_folder(settings.output_dir)
        workers = settings.train_dataset.num_parallel_workers
        shorten = not training.static_shapes
        batches = training_batches(run.rows, run.plan, run.start, training.batch_rank, workers, shorten)
        trainer = Trainer(args=mindformers_config(settings), train_dataset=batches)
        # Trainer takes a PreTrainedModel only; its task trainer takes any cell.
        trainer.trainer.network = training.build_network(run.rows.seq_length)
        trainer.trainer.training, trainer.trainer.total_steps = training, run.plan.total_steps
        updates = UpdateCallback(run, log, best)
        with hidden_stdout() as show:  # MindFormers prints its configuration before the first step
            trainer.callbacks = [LambdaCallback(on_train_begin=lambda _: show()), updates, *callbacks]
            trainer.train()
    finally:
        log.close()
    return updates.last


def finish_output(run: TrainingRun) -> None:
    """Draws the curves, and removes the folder for strategies that MindFormers creates in every run, if it is empty."""
    if run.ranks.first:
        run.plot()
        with suppress(OSError):
            (run.output_dir / STRATEGIES).rmdir()


def _finish_killed(run: TrainingRun) -> None:
    """What a run may not have done when it was killed after its last checkpoint."""
    if (
        run.checkpoint is not None
        and run.checkpoint.resolve().parent.parent == run.training.checkpoints.folder.resolve()
    ):
        begin_output(run)
        finish_output(run)


def _plan(settings: Settings, num_rows: int, training: Training, say: Say) -> TrainingPlan:
    """The plan of a run, with a remark if its warm-up does not end."""
    runner, schedule = settings.runner_config, settings.lr_schedule
    plan = TrainingPlan(
        num_rows=num_rows,
        batch_size=training.batch_size,
        accumulation_steps=runner.gradient_accumulation_steps,
        num_ranks=training.batch_ranks,
        epochs=runner.epochs,
        max_steps=runner.max_steps,
        seed=settings.seed,
        shuffle=settings.train_dataset.data_loader.shuffle,
        drop_remainder=settings.train_dataset.drop_remainder,
    )
    if schedule.warmup_ratio is None and schedule.warmup_steps >= plan.total_steps:
        say(
            f"lr_schedule.warmup_steps = {schedule.warmup_steps}: the run has {plan.total_steps} steps, so the "
            "learning rate never reaches its highest value"
        )
    return plan
