"""Runs on several cards: settings that do not fit the split of the work."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.parallel import config as parallel_config
from glm_ms.settings.errors import Problem
from glm_ms.settings.schema import AUTO, SEMI_AUTO, Settings, parallel_of, training_length

_MODE = "parallel.parallel_mode"
# Field of ParallelConfig -> key.
_KEYS = {
    "data_parallel": "parallel_config.data_parallel",
    "model_parallel": "parallel_config.model_parallel",
    "pipeline_stages": "parallel_config.pipeline_stage",
    "micro_batch_num": "parallel_config.micro_batch_num",
    "vocab_emb_dp": "parallel_config.vocab_emb_dp",
    "use_seq_parallel": "parallel_config.use_seq_parallel",
    "optimizer_shard": "parallel.enable_parallel_optimizer",
}
# Keys that need sharding strategies -> the value that does not.
_SHARDED_ONLY = {
    "parallel.full_batch": False,
    "parallel.enable_parallel_optimizer": False,
    "parallel_config.model_parallel": 1,
    "parallel_config.pipeline_stage": 1,
    "parallel_config.use_seq_parallel": False,
    "recompute_config.parallel_optimizer_comm_recompute": False,
}


def parallel_notes(settings: Settings) -> Iterator[str]:
    """A line for every parallel key on the command line of a run with `use_parallel: False`. A file may have such keys
    for its other runs."""
    if settings.use_parallel:
        return
    for key, where in settings.origins.items():
        if key.startswith(("parallel.", "parallel_config.")) and where.startswith("command line"):
            yield f"{where}: {key} has no effect with use_parallel: False"


def parallel_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of a run with `use_parallel: True`."""
    if not settings.use_parallel:
        return
    if settings.parallel.parallel_mode == SEMI_AUTO:
        yield from _unsupported_when_sharded(settings)
        yield from _recompute(settings)
        yield from _split(settings)
        return
    for key, plain in _SHARDED_ONLY.items():
        if settings.get(key) != plain:
            yield Problem(key, f"{settings.get(key)} needs {_MODE}: 1", (_MODE,))


def _split(settings: Settings) -> Iterator[Problem]:
    parallel, values = parallel_of(settings), vars(settings.model.model_config).copy()
    del values["type"]
    if values["padded_vocab_size"] == AUTO:  # known when the tokenizer is read
        values["padded_vocab_size"] = 64 * parallel.model_parallel
    try:
        config = GLMConfig(**values)
    except ConfigError:
        return  # reported by `checks`
    rows = settings.runner_config.batch_size * parallel.data_parallel
    length = training_length(settings)
    for field, reason in parallel_config.parallel_problems(config, parallel, rows, length):
        yield Problem(_KEYS[field], reason)


def _recompute(settings: Settings) -> Iterator[Problem]:
    recompute = settings.recompute_config
    if not recompute.mp_comm_recompute and not recompute.recompute:
        yield Problem("recompute_config.mp_comm_recompute", "False has no effect with recompute: False")
    if not recompute.parallel_optimizer_comm_recompute:
        return
    key, stage = "recompute_config.parallel_optimizer_comm_recompute", "parallel_config.pipeline_stage"
    if not settings.parallel.enable_parallel_optimizer:
        yield Problem(
            key, "True has no effect with enable_parallel_optimizer: False, which gathers no weights"
        )
    if settings.parallel_config.pipeline_stage > 1:
        yield Problem(
            key, "True: MindSpore's compiler does not support it in pipelines; set it to False", (stage,)
        )


def _unsupported_when_sharded(settings: Settings) -> Iterator[Problem]:
    if not settings.parallel.full_batch:
        message = "False, but with parallel_mode: 1 every card reads the whole batch; set it to True"
        yield Problem("parallel.full_batch", message, (_MODE,))
    if settings.context.use_fused_kernels:
        message = "True, but fused kernels have no sharding strategies; set it to False"
        yield Problem("context.use_fused_kernels", message, (_MODE,))
    if settings.context.mode != 0:
        yield Problem("context.mode", "1 (PyNative), but sharding needs graph mode; set it to 0", (_MODE,))
    if not settings.is_training():
        message = (
            f"1, but run_mode: {settings.run_mode} needs whole weights on every card; merge the checkpoint with "
            "tools/transform_ckpt.py and set parallel_mode: 0, which splits the records over the cards"
        )
        yield Problem(_MODE, message)
        return
    if settings.do_eval:
        message = (
            "True, but no card of a sharded run has the whole network to evaluate; set it to False, and evaluate "
            "merged checkpoints (tools/transform_ckpt.py)"
        )
        yield Problem("do_eval", message, (_MODE,))
    if settings.load_adapter:
        message = "sharded runs cannot load an adapter; train it with parallel_mode: 0"
        yield Problem("load_adapter", message, (_MODE,))
    if settings.runner_config.gradient_accumulation_steps > 1:
        message = (
            "above 1: not supported if sharded; use pipeline_stage and micro_batch_num, or more rows per step"
        )
        yield Problem("runner_config.gradient_accumulation_steps", message, (_MODE,))
    if settings.parallel_config.pipeline_stage > 1 and settings.model.pet_config.pet_type == "ptuning2":
        message = "above 1, but the prefix of P-Tuning is one weight that every stage needs; set it to 1"
        yield Problem("parallel_config.pipeline_stage", message, ("model.pet_config.pet_type",))
