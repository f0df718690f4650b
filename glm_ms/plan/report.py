"""A plan as text for the user."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.plan.run_plan import CardMemory, RunPlan

GIB = 2**30


def describe(plan: RunPlan, memory: int | None) -> Iterator[str]:
    """Lines about a run: what it is, the memory of a card, and the cost of a step.

    Args:
        plan: of the run.
        memory: bytes that a card has for it, None if unknown.
    """
    parallel = plan.parallel
    yield (
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; {_number(parallel.cards, 'card')}: "
        f"data_parallel {parallel.data_parallel} x model_parallel {parallel.model_parallel} x "
        f"pipeline_stage {parallel.pipeline_stages}"
    )
    yield from _memory(plan, plan.card)
    if memory is not None:
        free = memory - plan.card.total
        verdict = "fits" if free >= 0 else "does not fit"
        more = f"{_size(free)} left" if free >= 0 else f"{_size(-free)} too much"
        yield f"{verdict}: {_size(plan.card.total)} of {_size(memory)}, {more}"
    if plan.rows:
        yield from _step(plan)


def _memory(plan: RunPlan, card: CardMemory) -> Iterator[str]:
    where = f" (stage {card.stage}, which needs most)" if len(plan.stages) > 1 else ""
    yield f"memory of a card{where}:"
    training = plan.settings.is_training()
    recompute = plan.settings.recompute_config.recompute
    lines: list[tuple[str, int, str]] = [("weights", card.weights, "")]
    if training:
        lines += [
            ("gradients", card.gradients, "float32"),
            ("optimizer", card.optimizer, "two float32 moments"),
            ("copies of weights", card.copies, "cast to the compute type, or gathered"),
        ]
        step, other = card.activations_kept, card.activations_recomputed
        if recompute:
            step, other = other, step
        note = f"{'with' if recompute else 'without'} recompute; {'without' if recompute else 'with'} {_size(other)}"
        if card.activations > step:
            note = "while an evaluation reads prompts, more than a step's"
        lines.append(("activations", card.activations, note))
    else:
        lines.append(("activations", card.activations, "while prompts are read"))
    lines.append(("KV cache", card.kv_cache, ""))
    for name, size, note in lines:
        yield f"  {name:<18}{_size(size):>12}  {size:>15,} bytes{'  ' + note if note else ''}"
    yield f"  {'in all':<18}{_size(card.total):>12}  {card.total:>15,} bytes"


def _step(plan: RunPlan) -> Iterator[str]:
    cards = plan.parallel.cards
    yield "one update:"
    yield f"  {plan.rows:,} rows, {plan.tokens:,} tokens (padding included)"
    yield f"  {plan.flops / 1e12:,.1f} TFLOP, {plan.flops / cards / 1e12:,.1f} on each card"
    total = sum(plan.sent.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.sent.items() if size)
    yield f"  {_size(total)} sent by each card{': ' + parts if parts else ''}"


def _number(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _size(size: float) -> str:
    if not size:
        return "0"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
