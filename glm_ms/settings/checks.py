"""Keys that must fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from glm_ms.launch.processes import usable_cores
from glm_ms.metrics import metric_of
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.parallel import config as parallel_config
from glm_ms.settings.data_checks import file_problems, length_problems, loader_problems, settle_data
from glm_ms.settings.errors import Problem, independent
from glm_ms.settings.schema import (
    AUTO,
    Settings,
    bias_pairs,
    is_sharded,
    parallel_of,
    parts_in_use,
    training_length,
    unused_keys,
)
from glm_ms.spelling import TOOLS

_MODE, _PET = "parallel.parallel_mode", "model.pet_config.pet_type"
_BITS, _GROUP, _KEPT = "model.quantization_bit", "model.quantization_group", "model.kv_cache"
_SEQ_LENGTH = "model.model_config.seq_length"
_BASE, _ADAPTER, _STAGE = "load_checkpoint", "load_adapter", "parallel_config.pipeline_stage"
_BEAMS, _ANSWERS = "generation.num_beams", "generation.num_return_sequences"
_GATHER = "recompute_config.parallel_optimizer_comm_recompute"
# Field of ParallelConfig -> key, if the names differ from those in `parallel_config`.
_KEYS = {"pipeline_stages": _STAGE, "optimizer_shard": "parallel.enable_parallel_optimizer"}
# Keys that need sharding strategies -> the value that does not.
_SHARDED_ONLY = {
    "parallel.full_batch": False, "parallel.enable_parallel_optimizer": False, "parallel_config.model_parallel": 1,
    _STAGE: 1, "parallel_config.use_seq_parallel": False, _GATHER: False,
}  # fmt: skip


def _has_twice(values: list[Any]) -> bool:
    return len(set(values)) < len(values)


class Rule(NamedTuple):
    """A combination of values that cannot be used; for `key` and `depends_on` see `Problem`."""

    key: str
    applies: Callable[[Settings], Any]  # whether settings have the combination
    message: str  # with `str.format` fields of the settings, such as `{lr_schedule.lr_end}`
    depends_on: tuple[str, ...] = ()


_ALWAYS = (
    Rule("lr_schedule.total_steps", lambda s: s.lr_schedule.total_steps == 0,
         "found 0, must be -1 (all steps of the run) or at least 1"),
    Rule("lr_schedule.warmup_ratio", lambda s: s.lr_schedule.warmup_ratio is not None and s.lr_schedule.warmup_steps,
         "given together with warmup_steps; keep one"),
    Rule("lr_schedule.lr_end", lambda s: s.lr_schedule.lr_end > s.lr_schedule.learning_rate,
         "{lr_schedule.lr_end} is above learning_rate = {lr_schedule.learning_rate}", ("lr_schedule.learning_rate",)),
    Rule("lr_schedule.warmup_steps", lambda s: 0 < s.lr_schedule.total_steps < s.lr_schedule.warmup_steps,
         "{lr_schedule.warmup_steps} is more than all steps, lr_schedule.total_steps = {lr_schedule.total_steps}",
         ("lr_schedule.total_steps",)),
    Rule("lr_schedule.warmup_steps", lambda s: 0 < (s.runner_config.max_steps or 0) < s.lr_schedule.warmup_steps,
         "{lr_schedule.warmup_steps} is more than all steps, runner_config.max_steps = {runner_config.max_steps}",
         ("runner_config.max_steps",)),
    Rule(_ANSWERS, lambda s: s.generation.num_return_sequences > s.generation.num_beams > 1,
         "{generation.num_return_sequences} is more than num_beams = {generation.num_beams}", (_BEAMS,)),
    Rule(_ANSWERS,
         lambda s: s.generation.num_return_sequences > s.generation.num_beams == 1 and not s.generation.do_sample,
         "greedy decoding gives {generation.num_return_sequences} equal answers; set do_sample or num_beams",
         ("generation.do_sample", _BEAMS)),
    Rule("generation.max_length", lambda s: s.generation.max_length is not None
         and s.generation.max_length > s.model.model_config.seq_length,
         "{generation.max_length} is more than " f"{_SEQ_LENGTH} = {{{_SEQ_LENGTH}}}", (_SEQ_LENGTH,)),
    Rule("generation.min_new_tokens", lambda s: s.generation.min_new_tokens > s.generation.max_new_tokens,
         "{generation.min_new_tokens} is more than max_new_tokens = {generation.max_new_tokens}",
         ("generation.max_new_tokens",)),
    Rule("generation.logit_bias", lambda s: any(abs(bias) > 100 for _, bias in bias_pairs(s.generation.logit_bias)),
         "{generation.logit_bias}: numbers must be in [-100, 100]"),
    Rule("generation.logit_bias", lambda s: _has_twice([token for token, _ in bias_pairs(s.generation.logit_bias)]),
         "{generation.logit_bias}: an id is given twice"),
    Rule(_GROUP, lambda s: s.get(_GROUP) is not None and s.get(_BITS) != 4,
         f"{{{_GROUP}}} has no effect with {_BITS}: {{{_BITS}}}; groups are for 4 bits", (_BITS,)),
    Rule(_KEPT, lambda s: s.get(_KEPT) is not None and s.context.device_target != "CPU",
         f"{{{_KEPT}}}, but only the C++ kernels of a CPU have other types; set it to null",
         ("context.device_target",)),
    Rule("generation.do_sample", lambda s: s.generation.do_sample and s.generation.num_beams > 1,
         "sampling together with num_beams = {generation.num_beams} is not supported; keep one of both", (_BEAMS,)),
)  # fmt: skip

# Of runs with `parallel_mode: 1`.
_SHARDED = (
    Rule("parallel.full_batch", lambda s: not s.parallel.full_batch,
         "False, but with parallel_mode: 1 every card reads the whole batch; set it to True", (_MODE,)),
    Rule("context.use_fused_kernels", lambda s: s.context.use_fused_kernels is True,
         "True, but fused kernels have no sharding strategies; set it to auto or False", (_MODE,)),
    Rule("context.mode", lambda s: s.context.mode != 0,
         "1 (PyNative), but sharding needs graph mode; set it to 0", (_MODE,)),
    Rule(_MODE, lambda s: not s.is_training(),
         "1, but run_mode: {run_mode} needs whole weights on every card; merge the checkpoint with "
         "{tools[transform_ckpt]} and set parallel_mode: 0, which splits the records over the cards"),
    Rule("do_eval", lambda s: s.is_training() and s.do_eval,
         "True, but no card of a sharded run has the whole network to evaluate; set it to False, and evaluate "
         "merged checkpoints ({tools[transform_ckpt]})", (_MODE,)),
    Rule(_BITS, lambda s: s.is_training() and s.get(_BITS) is not None,
         "{model.quantization_bit}, but packed weights are not split over cards; set it to null, or parallel_mode: 0",
         (_MODE,)),
    Rule(_ADAPTER, lambda s: s.is_training() and s.load_adapter,
         "sharded runs cannot load an adapter; train it with parallel_mode: 0", (_MODE,)),
    Rule("runner_config.gradient_accumulation_steps",
         lambda s: s.is_training() and s.runner_config.gradient_accumulation_steps > 1,
         "above 1: not supported if sharded; use pipeline_stage and micro_batch_num, or more rows per step", (_MODE,)),
    Rule(_STAGE, lambda s: s.is_training() and s.get(_STAGE) > 1 and s.get(_PET) == "ptuning2",
         "above 1, but the prefix of P-Tuning is one weight that every stage needs; set it to 1", (_PET,)),
    Rule("recompute_config.mp_comm_recompute",
         lambda s: not s.recompute_config.mp_comm_recompute and not s.recompute_config.recompute,
         "False has no effect with recompute: False"),
    Rule(_GATHER, lambda s: s.get(_GATHER) and not s.parallel.enable_parallel_optimizer,
         "True has no effect with enable_parallel_optimizer: False, which gathers no weights"),
    Rule(_GATHER, lambda s: s.get(_GATHER) and s.get(_STAGE) > 1,
         "True: MindSpore's compiler does not support it in pipelines; set it to False", (_STAGE,)),
)  # fmt: skip

_ADAPTERS = (
    Rule(_BITS, lambda s: s.is_training() and s.get(_BITS) is not None and s.get(_PET) is None,
         f"{{{_BITS}}}, but integers cannot be trained; set {_PET} to train an adapter over them, or {_BITS} to null",
         (_PET,)),
    Rule(_BITS, lambda s: s.run_mode == "export" and s.get(_BITS) is not None,
         f"{{{_BITS}}}, but exported files have the weights as they are; set it to null"),
    Rule(_KEPT, lambda s: s.run_mode == "export" and s.get(_KEPT) is not None,
         f"{{{_KEPT}}}, but the cache of exported graphs has the type of the arithmetic; set it to null"),
    Rule(_ADAPTER, lambda s: s.is_training() and s.get(_PET) is None and s.load_adapter,
         f"training would change the weights under the adapter; set {_PET} to continue training the adapter, or merge "
         "it first ({tools[merge_lora]}) and start from the result", (_PET,)),
    Rule(_PET, lambda s: s.is_training() and s.get(_PET) is not None and not s.load_checkpoint,
         f"{{{_PET}}} trains an adapter for given base weights, and random ones are lost after the run; name the base "
         "(--load_checkpoint PATH)", (_BASE,)),
    Rule(_ADAPTER, lambda s: not s.is_training() and s.load_adapter and not s.load_checkpoint,
         "needs the base it was trained on (--load_checkpoint PATH)", (_BASE,)),
)  # fmt: skip

_INTERVALS, _BEST = ("eval_step_interval", "eval_epoch_interval"), "checkpoint.best_metric"
_TRAINING = (
    Rule("eval_step_interval", lambda s: s.eval_step_interval == 0, "found 0, must be -1 (never) or at least 1"),
    Rule("eval_epoch_interval", lambda s: s.eval_epoch_interval == 0, "found 0, must be -1 (never) or at least 1"),
    Rule("do_eval", lambda s: s.do_eval and s.eval_step_interval == s.eval_epoch_interval == -1,
         "True, but eval_step_interval and eval_epoch_interval are both -1; set one of them", _INTERVALS),
    Rule(_BEST, lambda s: s.checkpoint.best_metric is not None and not s.do_eval,
         f"{{{_BEST}}} is known by evaluation only; set do_eval: True, or best_metric: null", ("do_eval",)),
)  # fmt: skip


def check(settings: Settings, reported: Iterable[Problem] = (), check_files: bool = True) -> list[Problem]:
    """Checks converted settings, with `check_files` also the files and folders of the run mode.

    Adjusts `notes`, dataset paths, row lengths and the number of workers in place. What follows from the `reported`
    problems is not reported again.
    """
    settle(settings)
    found = [*_model_config(settings), *unused_keys(settings, "lr_schedule"), *violated(settings, _ALWAYS)]
    for problem in _of_run_mode(settings, check_files):
        found.append(dataclasses.replace(problem, depends_on=(*problem.depends_on, "run_mode")))
    return placed(settings, independent(found, reported))


def placed(settings: Settings, problems: Iterable[Problem]) -> list[Problem]:
    """The problems with the places of their keys."""
    return [one if one.where else dataclasses.replace(one, where=settings.where(one.key)) for one in problems]


def settle(settings: Settings) -> None:
    """Gives values that depend on other keys, or on this machine, their meaning; adds notes for the user."""
    if not settings.use_parallel:  # a file may have such keys for its other runs
        settings.notes += [
            f"{where}: {key} has no effect with use_parallel: False"
            for key, where in settings.origins.items()
            if key.startswith(("parallel.", "parallel_config.")) and where.startswith("command line")
        ]
    if settings.get(_KEPT) is not None and settings.is_training() and not settings.do_eval:
        value = f"{_KEPT}: {settings.get(_KEPT)}"
        settings.notes.append(f"{settings.where(_KEPT)}: {value} has no effect in training without do_eval")
    cores, dataset = usable_cores(), settings.train_dataset
    if dataset.num_parallel_workers > cores:
        lowered = f"lowered from {dataset.num_parallel_workers} to {cores}, the cores of this machine"
        settings.notes.append(f"train_dataset.num_parallel_workers: {lowered}")
        dataset.num_parallel_workers = cores
    settle_data(settings)


def violated(settings: Settings, rules: Iterable[Rule]) -> Iterator[Problem]:
    """The problems of the rules that apply."""
    for key, applies, message, depends_on in rules:
        if applies(settings):
            yield Problem(key, message.format(**vars(settings), tools=TOOLS), depends_on)


def _of_run_mode(settings: Settings, check_files: bool) -> Iterator[Problem]:
    training, kind = settings.is_training(), settings.get(_PET)
    if is_sharded(settings):
        yield from violated(settings, _SHARDED)
        yield from _split(settings)
    elif settings.use_parallel:
        for key, plain in _SHARDED_ONLY.items():
            if settings.get(key) != plain:
                yield Problem(key, f"{settings.get(key)} needs {_MODE}: 1", (_MODE,))
    if training or kind is not None:  # the settings of a LoRA run may serve to evaluate its merged weights
        yield from unused_keys(settings, "model.pet_config")
    yield from violated(settings, _ADAPTERS)
    if training:
        yield from violated(settings, _TRAINING)
        yield from _best_metric(settings)
        yield from unused_keys(settings, "runner_wrapper.scale_sense")
    for part in parts_in_use(settings):
        yield from loader_problems(settings, part)
        yield from length_problems(settings, part)
    if settings.resume and settings.run_mode not in ("eval", "predict"):
        advice = "; training continues with --resume_training" if training else ""
        yield Problem("resume", f"True has no effect with run_mode {settings.run_mode}{advice}")
    if settings.run_mode == "export":
        if settings.use_parallel:
            yield Problem("use_parallel", "True, but one process writes the exported files; set it to False")
        if settings.resume:
            yield Problem("resume", "True, but exported files are written as a whole; remove it")
    if settings.run_mode == "predict" and not settings.predict_data:
        yield Problem("predict_data", "missing; give a prompt, a .txt or .jsonl file, or - (--predict_data)")
    if check_files:
        yield from file_problems(settings)


def _network(settings: Settings) -> GLMConfig:
    """The architecture; an unknown size of the vocabulary is one that every split divides."""
    values = vars(settings.model.model_config).copy()
    del values["type"]
    if values["padded_vocab_size"] == AUTO:
        values["padded_vocab_size"] = 64 * settings.parallel_config.model_parallel
    return GLMConfig(**values)


def _model_config(settings: Settings) -> Iterator[Problem]:
    try:
        _network(settings)
    except ConfigError as error:
        message = str(error).removeprefix(f"{error.field} = ").removeprefix(f"{error.field} ")
        yield Problem(f"model.model_config.{error.field}", message)


def _split(settings: Settings) -> Iterator[Problem]:
    try:
        config = _network(settings)
    except ConfigError:
        return  # reported by `_model_config`
    parallel = parallel_of(settings)
    rows = settings.runner_config.batch_size * parallel.data_parallel
    for field, reason in parallel_config.parallel_problems(config, parallel, rows, training_length(settings)):
        yield Problem(_KEYS.get(field, f"parallel_config.{field}"), reason)


def _best_metric(settings: Settings) -> Iterator[Problem]:
    name, chosen = settings.checkpoint.best_metric, settings.metric.type
    if name is not None and metric_of(name) not in chosen:
        message = f"{name} is measured by {metric_of(name)}, but metric.type is {', '.join(chosen)}; add it"
        yield Problem(_BEST, message, ("metric.type",))
