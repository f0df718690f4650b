"""`nearest_fit`: the smallest change of settings with which a run fits its cards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from glm_ms.plan.card import RunPlan
from glm_ms.settings import Settings
from glm_ms.settings.parallel_checks import is_sharded

# What a change costs its user, roughly: whether only time is lost, the batch changes, or the cluster is used otherwise.
_RECOMPUTE, _GATHER_AGAIN, _SHARD_OPTIMIZER, _SEQUENCE, _HALVE, _DOUBLE_MODEL, _DOUBLE_STAGES = (
    1,
    1,
    2,
    2,
    3,
    3,
    5,
)
_ALL_SHARDED = (
    "parallel.parallel_mode=1",
    "parallel.full_batch=True",
    "do_eval=False",
    "runner_config.gradient_accumulation_steps=1",
)

Change = tuple[int, tuple[str, ...]]


def nearest_fit(
    settings: Settings, num_cards: int, memory: int, replan: Callable[[Sequence[str]], RunPlan | None]
) -> tuple[tuple[str, ...], RunPlan] | None:
    """The cheapest change with which the run fits.

    Args:
        settings: that do not fit.
        num_cards: cards there are.
        memory: bytes of a card for the run.
        replan: overrides -> plan of the settings with them, None where they are refused.

    Returns:
        (overrides, plan), or None: nothing tried here fits.
    """
    for overrides in _candidates(settings, num_cards):
        plan = replan(overrides)
        if plan is not None and plan.card.total <= memory:
            return overrides, plan
    return None


def _candidates(settings: Settings, num_cards: int) -> Iterator[tuple[str, ...]]:
    """Overrides, the cheapest first."""
    if not settings.is_training():
        halves = _halved("eval_dataset.batch_size", settings.eval_dataset.batch_size)
        yield from (change for _, change in halves if change)
        return
    choices = (
        _recompute(settings),
        _splits(settings, num_cards),
        list(_halved("runner_config.batch_size", settings.runner_config.batch_size)),
    )
    combined = []
    for parts in itertools.product(*choices):
        overrides = tuple(text for _, texts in parts for text in texts)
        combined.append((sum(cost for cost, _ in parts), overrides))
    yield from (overrides for _, overrides in sorted(combined, key=lambda item: item[0]) if overrides)


def _recompute(settings: Settings) -> list[Change]:
    recompute = settings.recompute_config
    own = () if recompute.recompute else ("recompute_config.recompute=True",)
    choices: list[Change] = [(0, ())]
    if own:
        choices.append((_RECOMPUTE, own))
    if not recompute.parallel_optimizer_comm_recompute:
        again = (*own, "recompute_config.parallel_optimizer_comm_recompute=True")
        choices.append((_GATHER_AGAIN + (_RECOMPUTE if own else 0), again))
    return choices


def _splits(settings: Settings, num_cards: int) -> list[Change]:
    """Ways to use the cards, with what each costs."""
    split, sharded = settings.parallel_config, is_sharded(settings)
    again = settings.recompute_config.parallel_optimizer_comm_recompute
    choices: list[Change] = [(0, ())]
    if num_cards == 1:
        return choices
    for model, stages in itertools.product(_doubled(split.model_parallel), _doubled(split.pipeline_stage)):
        if num_cards % (model * stages):
            continue
        cost = _SHARD_OPTIMIZER if not settings.parallel.enable_parallel_optimizer else 0
        cost += _DOUBLE_MODEL * (model // split.model_parallel).bit_length() - _DOUBLE_MODEL
        cost += _DOUBLE_STAGES * (stages // split.pipeline_stage).bit_length() - _DOUBLE_STAGES
        texts = (
            "use_parallel=True", *(() if sharded else _ALL_SHARDED), "parallel.enable_parallel_optimizer=True",
            f"parallel_config.data_parallel={num_cards // (model * stages)}",
            f"parallel_config.model_parallel={model}", f"parallel_config.pipeline_stage={stages}",
            f"parallel_config.micro_batch_num={2 * stages if stages > 1 else 1}",
            *(("recompute_config.parallel_optimizer_comm_recompute=False",) if stages > 1 and again else ()),
        )  # fmt: skip
        choices.append((cost, texts))
        if model > 1:
            choices.append((cost + _SEQUENCE, (*texts, "parallel_config.use_seq_parallel=True")))
    return choices


def _doubled(start: int) -> list[int]:
    return [start * 2**power for power in range(4)]


def _halved(key: str, size: int) -> Iterator[Change]:
    yield 0, ()
    cost = 0
    while size > 1:
        size, cost = size // 2, cost + _HALVE
        yield cost, (f"{key}={size}",)
