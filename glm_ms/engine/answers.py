"""Answers of a network to many prompts, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from glm_ms.engine.ranks import Ranks
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.sampling import rows_before

# Batches that a rank answers between two exchanges, if there are enough for all ranks.
_MOST_BATCHES = 8


def answers_in_order(
    model: GLMForCausalLM, prompts: Sequence[Sequence[int]], options: Mapping[str, Any], slots: int, ranks: Ranks,
    start: int = 0
) -> Iterator[list[list[int]]]:  # fmt: skip
    """Yields the generated ids of each prompt from number `start` on, on every rank, in order.

    Prompts run in `slots` at a time and join as others end, so that none waits for the longest one of a batch. Neither
    `start` nor the number of ranks, which take parts of the prompts in turn, changes an answer.

    Raises RankError if another rank has failed, and what `model.answers` raises.
    """
    copies = rows_before(map(tuple, prompts), repeat(options["num_return_sequences"]))
    limit = options["max_length"] or model.config.seq_length
    length = max(min(len(prompt) + options["max_new_tokens"], limit) for prompt in prompts)

    def answer(numbers: range) -> Iterator[list[list[int]]]:
        part = [prompts[i] for i in numbers]
        early: dict[int, list[list[int]]] = {}  # those that have overtaken others
        following = 0
        own = [copies[i] for i in numbers]
        for number, found in model.answers(part, slots=slots, length=length, copies=own, **options):
            early[number] = found
            while following in early:
                yield early.pop(following)
                following += 1

    if ranks.size == 1:
        yield from answer(range(start, len(prompts))) if start < len(prompts) else ()
        return
    batches = (len(prompts) - start) // (slots * ranks.size)
    step = slots * min(max(batches, 1), _MOST_BATCHES)
    parts = [range(i, min(i + step, len(prompts))) for i in range(start, len(prompts), step)]
    for found in ranks.share_out(parts, lambda numbers: list(answer(numbers))):
        yield from found
