"""Sharded runs (`parallel.parallel_mode: 1`): what cannot be split so, and what is not done with split weights."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.parallel.config import ParallelConfig, parallel_problems
from glm_ms.settings.schema import AUTO, Settings

Problem = tuple[str, str, tuple[str, ...]]
SEMI_AUTO = 1
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


def is_sharded(settings: Settings) -> bool:
    """Whether strategies split the work, and not only the batch."""
    return settings.use_parallel and settings.parallel.parallel_mode == SEMI_AUTO


def parallel_of(settings: Settings, num_cards: int | None = None) -> ParallelConfig:
    """How a run splits its work.

    Args:
        settings: of the run.
        num_cards: with `parallel_mode: 0`, where every card has the whole network; None: `data_parallel` of them.
    """
    split = settings.parallel_config
    if not is_sharded(settings):
        cards = (num_cards or split.data_parallel) if settings.use_parallel else 1
        return ParallelConfig(data_parallel=cards)
    return ParallelConfig(
        data_parallel=split.data_parallel,
        model_parallel=split.model_parallel,
        pipeline_stages=split.pipeline_stage,
        micro_batch_num=split.micro_batch_num,
        vocab_emb_dp=split.vocab_emb_dp,
        use_seq_parallel=split.use_seq_parallel,
        optimizer_shard=settings.parallel.enable_parallel_optimizer,
    )


def sharding_problems(settings: Settings) -> Iterator[Problem]:
    """(key, what is wrong with it, other keys it depends on) for each problem of a sharded run."""
    if not is_sharded(settings):
        return
    yield from _not_with_slices(settings)
    yield from _recomputed(settings)
    parallel, values = parallel_of(settings), vars(settings.model.model_config).copy()
    del values["type"]
    if values["padded_vocab_size"] == AUTO:  # known when the tokenizer is read
        values["padded_vocab_size"] = 64 * parallel.model_parallel
    try:
        config = GLMConfig(**values)
    except ConfigError:
        return  # has its own message
    rows = settings.runner_config.batch_size * parallel.data_parallel
    seq_length = training_length(settings)
    for field, reason in parallel_problems(config, parallel, rows, seq_length):
        yield _KEYS[field], reason, ()


def training_length(settings: Settings) -> int:
    """Positions of a training row."""
    data = settings.train_dataset
    if data.data_loader.type == "ToolAlpacaDataLoader":
        return data.max_seq_length or settings.model.model_config.seq_length
    return data.max_source_length + data.max_target_length + 1


def idle_keys(settings: Settings) -> Iterator[str]:
    """A remark for every key typed for several cards, where `use_parallel` is False. A file may well hold such keys for
    its other runs."""
    for key, where in settings.origins.items():
        if key.startswith(("parallel.", "parallel_config.")) and where.startswith("command line"):
            yield f"{where}: {key} has no effect with use_parallel: False"


def _recomputed(settings: Settings) -> Iterator[Problem]:
    recompute = settings.recompute_config
    if not recompute.mp_comm_recompute and not recompute.recompute:
        yield "recompute_config.mp_comm_recompute", "False has no effect with recompute: False", ()
    key = "recompute_config.parallel_optimizer_comm_recompute"
    if not recompute.parallel_optimizer_comm_recompute:
        return
    if not settings.parallel.enable_parallel_optimizer:
        yield key, "True, but weights are gathered only where enable_parallel_optimizer is True", ()
    if settings.parallel_config.pipeline_stage > 1:
        yield (
            key,
            "True, which MindSpore's compiler does not do for pipelines; set it to False",
            ("parallel_config.pipeline_stage",),
        )


def _not_with_slices(settings: Settings) -> Iterator[Problem]:
    mode = "parallel.parallel_mode"
    if not settings.parallel.full_batch:
        yield (
            "parallel.full_batch",
            "False, but with parallel_mode: 1 every card reads the whole batch",
            (mode,),
        )
    if settings.context.use_fused_kernels:
        yield (
            "context.use_fused_kernels",
            "True, but fused kernels have no strategies yet; set it to False",
            (mode,),
        )
    if settings.context.mode != 0:
        yield "context.mode", "1 (PyNative), but strategies need graph mode; set it to 0", (mode,)
    if not settings.is_training():
        yield (
            mode,
            f"1, but run_mode: {settings.run_mode} needs whole weights on every card; merge the checkpoint with "
            "tools/transform_ckpt.py and set parallel_mode: 0, which splits the records over the cards",
            (),
        )
        return
    if settings.do_eval:
        yield (
            "do_eval",
            "True, but a card of a sharded run has no whole network to evaluate; set it to False, and evaluate "
            "merged checkpoints (tools/transform_ckpt.py)",
            (mode,),
        )
    if settings.load_adapter:
        yield (
            "load_adapter",
            "an adapter cannot be proven on split weights; train it with parallel_mode: 0",
            (mode,),
        )
    if settings.runner_config.gradient_accumulation_steps > 1:
        yield (
            "runner_config.gradient_accumulation_steps",
            "has no place in a sharded step; use pipeline_stage and micro_batch_num, or more rows per step",
            (mode,),
        )
    if settings.parallel_config.pipeline_stage > 1 and settings.model.pet_config.pet_type == "ptuning2":
        yield (
            "parallel_config.pipeline_stage",
            "above 1, but the prefix of P-Tuning is one weight that every stage would need; set it to 1",
            ("model.pet_config.pet_type",),
        )
