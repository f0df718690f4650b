"""`nearest_fit`: the smallest change of settings with which a run fits its cards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from glm_ms.plan.run_plan import RunPlan
from glm_ms.settings import Settings
from glm_ms.settings.schema import BATCH_SIZE_KEYS, is_sharded

# Rough cost of a change for the user: more time, another batch size, or another use of the cluster.
_RECOMPUTE = _GATHER_AGAIN = 1
_SHARD_OPTIMIZER = _SEQUENCE = 2
_HALVE = _DOUBLE_MODEL = 3
_LEAVE_DATA_PARALLEL = 3  # no evaluation during training, and checkpoints must be merged
_DOUBLE_STAGES = 5
# Settings that a run with sharded weights needs.
_ALL_SHARDED = (
    "parallel.parallel_mode=1", "parallel.full_batch=True", "do_eval=False", "checkpoint.best_metric=null",
    "context.use_fused_kernels=auto", "runner_config.gradient_accumulation_steps=1",
)  # fmt: skip

Change = tuple[int, tuple[str, ...]]


def nearest_fit(
    settings: Settings, num_cards: int, memory: int, replan: Callable[[Sequence[str]], RunPlan | None]
) -> tuple[tuple[str, ...], RunPlan] | None:
    """The cheapest change with which a run fits into `memory` bytes of a card: (overrides, plan), None if none fits.

    `replan` makes the plan of the settings with overrides, None if they are refused.
    """
    for overrides in _candidates(settings, num_cards):
        plan = replan(overrides)
        if plan is not None and plan.card.total <= memory:
            return overrides, plan
    return None


def _candidates(settings: Settings, num_cards: int) -> Iterator[tuple[str, ...]]:
    """Overrides, the cheapest first."""
    halves = list(_halved(BATCH_SIZE_KEYS[settings.run_mode], settings.batch_size()))
    if not settings.is_training():
        yield from (change for _, change in halves if change)
        return
    choices = [_recompute(settings), _splits(settings, num_cards), halves]
    if settings.do_eval:
        choices.append(list(_halved("eval_dataset.batch_size", settings.eval_dataset.batch_size)))
    combined = [
        (sum(cost for cost, _ in parts), tuple(text for _, texts in parts for text in texts))
        for parts in itertools.product(*choices)
    ]
    combined.sort(key=lambda item: (item[0], len(item[1])))
    yield from (overrides for _, overrides in combined if overrides)


def _recompute(settings: Settings) -> list[Change]:
    recompute = settings.recompute_config
    choices: list[Change] = [(0, ())]
    if not recompute.recompute:
        choices.append((_RECOMPUTE, ("recompute_config.recompute=True",)))
    if not recompute.parallel_optimizer_comm_recompute:
        again = "recompute_config.parallel_optimizer_comm_recompute=True"
        choices += [(cost + _GATHER_AGAIN, (*texts, again)) for cost, texts in choices]
    return choices


def _splits(settings: Settings, num_cards: int) -> list[Change]:
    """Other splits of the cards, with their costs."""
    split, sharded = settings.parallel_config, is_sharded(settings)
    again = settings.recompute_config.parallel_optimizer_comm_recompute
    choices: list[Change] = [(0, ())]
    if num_cards == 1:
        return choices
    leaving = () if sharded else _ALL_SHARDED
    base = 0 if settings.parallel.enable_parallel_optimizer else _SHARD_OPTIMIZER
    if not sharded:
        base += _LEAVE_DATA_PARALLEL
        base += _HALVE * (settings.runner_config.gradient_accumulation_steps.bit_length() - 1)
    for more_model, more_stages in itertools.product(range(4), range(4)):
        model, stages = split.model_parallel * 2**more_model, split.pipeline_stage * 2**more_stages
        if num_cards % (model * stages):
            continue
        cost = base + _DOUBLE_MODEL * more_model + _DOUBLE_STAGES * more_stages
        micro = split.micro_batch_num if stages == split.pipeline_stage else 2 * stages
        texts = (
            "use_parallel=True", *leaving, "parallel.enable_parallel_optimizer=True",
            f"parallel_config.data_parallel={num_cards // (model * stages)}",
            f"parallel_config.model_parallel={model}", f"parallel_config.pipeline_stage={stages}",
            f"parallel_config.micro_batch_num={micro}",
            *(("recompute_config.parallel_optimizer_comm_recompute=False",) if stages > 1 and again else ()),
        )  # fmt: skip
        choices.append((cost, texts))
        if model > 1:
            choices.append((cost + _SEQUENCE, (*texts, "parallel_config.use_seq_parallel=True")))
    return choices


def _halved(key: str, size: int) -> Iterator[Change]:
    yield 0, ()
    cost = 0
    while size > 1:
        size, cost = size // 2, cost + _HALVE
        yield cost, (f"{key}={size}",)
