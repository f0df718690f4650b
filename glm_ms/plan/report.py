"""A plan as text for the user."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.plan.run_plan import CardMemory, RunPlan

GIB = 2**30


def describe(plan: RunPlan, memory: int | None) -> Iterator[str]:
    """Lines about a run: what it is, the memory of a card, and the cost of a step.

    `memory` is the number of bytes that a card has for it, None if unknown.
    """
    parallel, card = plan.parallel, plan.card
    yield (
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; {parallel.cards} card"
        f"{'' if parallel.cards == 1 else 's'}: data_parallel {parallel.data_parallel} x "
        f"model_parallel {parallel.model_parallel} x pipeline_stage {parallel.pipeline_stages}"
    )
    where = f" (stage {card.stage}, which needs most)" if len(plan.stages) > 1 else ""
    yield f"memory of a card{where}:"
    for name, size, note in (*_memory(plan, card), ("in all", card.total, "")):
        yield f"  {name:<18}{_size(size):>12}  {size:>15,} bytes{'  ' + note if note else ''}"
    if memory is not None:
        free = memory - card.total
        more = f"{_size(free)} left" if free >= 0 else f"{_size(-free)} too much"
        verdict = "fits" if free >= 0 else "does not fit"
        yield f"{verdict}: {_size(card.total)} of {_size(memory)}, {more}"
    if plan.rows:
        yield "one update:"
        yield f"  {plan.rows:,} rows, {plan.tokens:,} tokens (padding included)"
        yield f"  {plan.flops / 1e12:,.1f} TFLOP, {plan.flops / parallel.cards / 1e12:,.1f} on each card"
        parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.sent.items() if size)
        yield f"  {_size(sum(plan.sent.values()))} sent by each card{': ' + parts if parts else ''}"


def _memory(plan: RunPlan, card: CardMemory) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and note of each part."""
    yield "weights", card.weights, ""
    note = "while prompts are read"
    if plan.settings.is_training():
        yield "gradients", card.gradients, "float32"
        yield "optimizer", card.optimizer, "two float32 moments"
        yield "copies of weights", card.copies, "cast to the compute type, or gathered"
        recompute = plan.settings.recompute_config.recompute
        step, other = card.activations_kept, card.activations_recomputed
        step, other = (other, step) if recompute else (step, other)
        set_so, not_so = ("with", "without") if recompute else ("without", "with")
        note = f"{set_so} recompute; {not_so} {_size(other)}"
        if card.activations > step:
            note = "while an evaluation reads prompts, more than a step's"
    yield "activations", card.activations, note
    yield "KV cache", card.kv_cache, ""


def _size(size: float) -> str:
    if not size:
        return "0"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
