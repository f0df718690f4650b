"""Keys that must fit each other. Every check yields problems."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

from glm_ms.metrics import metric_of
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.settings.data_checks import data_notes, data_problems, fill_max_seq_length
from glm_ms.settings.errors import Problem, independent
from glm_ms.settings.files import file_problems
from glm_ms.settings.parallel_checks import parallel_notes, parallel_problems
from glm_ms.settings.schema import AUTO, Settings, parts_in_use, unused_keys

_PET = "model.pet_config"
_SEQ_LENGTH = "model.model_config.seq_length"


def check(settings: Settings, reported: Iterable[Problem] = (), check_files: bool = True) -> list[Problem]:
    """Checks converted settings, and adjusts what may be adjusted with a note.

    Args:
        settings: `notes`, dataset paths, row lengths and the number of workers are adjusted in place.
        reported: problems that are known already; what follows from them is not reported.
        check_files: also check that the files and folders of the run mode exist.
    """
    settle(settings)
    found = [*value_problems(settings), *(file_problems(settings) if check_files else ())]
    return placed(settings, independent(found, reported))


def placed(settings: Settings, problems: Iterable[Problem]) -> list[Problem]:
    """The problems with the places of their keys."""
    return [dataclasses.replace(problem, where=settings.where(problem.key)) for problem in problems]


def settle(settings: Settings) -> None:
    """Gives values that depend on other keys, or on this machine, their meaning; adds notes for the user."""
    settings.notes += parallel_notes(settings)
    cores, dataset = _cores(), settings.train_dataset
    if dataset.num_parallel_workers > cores:
        settings.notes.append(
            f"train_dataset.num_parallel_workers: lowered from {dataset.num_parallel_workers} to {cores}, the cores "
            "of this machine"
        )
        dataset.num_parallel_workers = cores
    fill_max_seq_length(settings)
    for part in parts_in_use(settings):
        settings.notes += data_notes(settings, part)


def value_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of keys against each other."""
    yield from _model_config(settings)
    yield from _learning_rate(settings)
    yield from _generation(settings)
    for problem in _of_run_mode(settings):
        yield dataclasses.replace(problem, depends_on=(*problem.depends_on, "run_mode"))


def _of_run_mode(settings: Settings) -> Iterator[Problem]:
    yield from parallel_problems(settings)
    yield from _adapter(settings)
    if settings.is_training():
        yield from _evaluation_intervals(settings)
        yield from _best_metric(settings)
        yield from unused_keys(settings, "runner_wrapper.scale_sense")
    for part in parts_in_use(settings):
        yield from data_problems(settings, part)
    if settings.run_mode == "predict" and not settings.predict_data:
        yield Problem("predict_data", "missing; give a prompt, a .txt or .jsonl file, or - (--predict_data)")


def _model_config(settings: Settings) -> Iterator[Problem]:
    values = vars(settings.model.model_config).copy()
    del values["type"]
    if values["padded_vocab_size"] == AUTO:
        values["padded_vocab_size"] = 1
    try:
        GLMConfig(**values)
    except ConfigError as error:
        yield Problem(f"model.model_config.{error.field}", str(error))


def _learning_rate(settings: Settings) -> Iterator[Problem]:
    schedule = settings.lr_schedule
    yield from unused_keys(settings, "lr_schedule")
    if schedule.total_steps == 0:
        yield Problem("lr_schedule.total_steps", "found 0, must be -1 (all steps of the run) or at least 1")
    if schedule.warmup_ratio is not None and schedule.warmup_steps:
        yield Problem("lr_schedule.warmup_ratio", "given together with warmup_steps; keep one")
    if schedule.lr_end > schedule.learning_rate:
        message = f"{schedule.lr_end} is above learning_rate = {schedule.learning_rate}"
        yield Problem("lr_schedule.lr_end", message, ("lr_schedule.learning_rate",))
    for key in ("lr_schedule.total_steps", "runner_config.max_steps"):
        steps = settings.get(key)
        if steps is not None and 0 < steps < schedule.warmup_steps:
            message = f"{schedule.warmup_steps} is more than all steps, {key} = {steps}"
            yield Problem("lr_schedule.warmup_steps", message, (key,))


def _generation(settings: Settings) -> Iterator[Problem]:
    generation, seq_length = settings.generation, settings.model.model_config.seq_length
    number, beams = generation.num_return_sequences, generation.num_beams
    if number > beams > 1:
        message = f"{number} is more than num_beams = {beams}"
        yield Problem("generation.num_return_sequences", message, ("generation.num_beams",))
    elif number > beams and not generation.do_sample:
        message = f"greedy decoding gives {number} equal answers; set do_sample or num_beams"
        others = ("generation.do_sample", "generation.num_beams")
        yield Problem("generation.num_return_sequences", message, others)
    if generation.max_length is not None and generation.max_length > seq_length:
        message = f"{generation.max_length} is more than {_SEQ_LENGTH} = {seq_length}"
        yield Problem("generation.max_length", message, (_SEQ_LENGTH,))
    if generation.do_sample and beams > 1:
        message = f"sampling together with num_beams = {beams} is not supported; keep one of both"
        yield Problem("generation.do_sample", message, ("generation.num_beams",))


def _adapter(settings: Settings) -> Iterator[Problem]:
    kind, training = settings.model.pet_config.pet_type, settings.is_training()
    pet_type = f"{_PET}.pet_type"
    if training or kind is not None:  # the settings of a LoRA run may serve to evaluate its merged weights
        yield from unused_keys(settings, _PET)
    if training and kind is None and settings.load_adapter:
        message = (
            f"training would change the weights under the adapter; set {pet_type} to continue training the adapter, or "
            "merge it first (tools/merge_lora.py) and start from the result"
        )
        yield Problem("load_adapter", message, (pet_type,))
    if training and kind is not None and not settings.load_checkpoint:
        message = (
            f"{kind} trains an adapter for given base weights, and random ones are lost after the run; name the base "
            "(--load_checkpoint PATH)"
        )
        yield Problem(pet_type, message, ("load_checkpoint",))
    if not training and kind is not None and not settings.load_adapter:
        message = (
            f"{kind}, but there is no adapter to load; name it (--load_adapter PATH), or set {pet_type}=null for "
            "the base alone or for merged weights"
        )
        yield Problem(pet_type, message, ("load_adapter",))
    if not training and settings.load_adapter and not settings.load_checkpoint:
        message = "needs the base it was trained on (--load_checkpoint PATH)"
        yield Problem("load_adapter", message, ("load_checkpoint",))


def _evaluation_intervals(settings: Settings) -> Iterator[Problem]:
    intervals = ("eval_step_interval", "eval_epoch_interval")
    for name in intervals:
        if settings.get(name) == 0:
            yield Problem(name, "found 0, must be -1 (never) or at least 1")
    if settings.do_eval and all(settings.get(name) == -1 for name in intervals):
        message = "True, but eval_step_interval and eval_epoch_interval are both -1; set one of them"
        yield Problem("do_eval", message, intervals)


def _best_metric(settings: Settings) -> Iterator[Problem]:
    name, key = settings.checkpoint.best_metric, "checkpoint.best_metric"
    if name is None:
        return
    if not settings.do_eval:
        message = f"{name} is known by evaluation only; set do_eval: True, or best_metric: null"
        yield Problem(key, message, ("do_eval",))
    needed = metric_of(name)
    if needed not in settings.metric.type:
        chosen = ", ".join(settings.metric.type)
        message = f"{name} is measured by {needed}, but metric.type is {chosen}; add it"
        yield Problem(key, message, ("metric.type",))


def _cores() -> int:
    """Cores this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
