"""What the server's scheduler costs beside the network: its rounds over a decoder that answers at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glm_ms.bench.machine import Load
from glm_ms.bench.timings import Timing, chosen_tokenizer
from glm_ms.generation.config import GenerationConfig
from glm_ms.serve.answer import Job
from glm_ms.serve.scheduler import Scheduler
from glm_ms.tokenizer import SentencePieceTokenizer

_VOCABULARY = 65024
_BANK = 24  # steps until scores come again
_LIKELY = 8  # tokens of each row
_PROMPT = 64
# Title -> options of every row.
_OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampled, top_p 0.8": {"do_sample": True, "top_p": 0.8, "temperature": 0.8},
}


class InstantDecoder:
    """A `SlotDecoder` whose scores are ready: random ones of a vocabulary with `pieces` ids, a few of which are likely,
    as in a trained network."""

    capacity, vocab_size, exact_rows = 1 << 20, _VOCABULARY, False
    pages_total = pages_used = 0

    def __init__(self, slots: int, pieces: int) -> None:
        self.slots, self.free_slots, self.steps = slots, list(range(slots)), 0
        self.scores = np.full((_BANK, slots, _VOCABULARY), -60, np.float32)
        rng = np.random.default_rng(0)
        self.scores[..., :pieces] = rng.standard_normal((_BANK, slots, pieces), np.float32) * 2
        likely = rng.integers(0, pieces, (_BANK, slots, _LIKELY))
        np.put_along_axis(self.scores, likely, rng.random(likely.shape, np.float32) * 4 + 14, -1)

    def open(self, ids: Sequence[int], adapter: str | None = None) -> int:
        return self.free_slots.pop()

    def cached(self, slot: int) -> int:
        return 0

    def prefill(self, slot: int, all_logits: bool = False) -> np.ndarray:
        return self.scores[0, slot]

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        self.steps += 1
        return self.scores[self.steps % _BANK, : len(slots)]

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
        raise NotImplementedError  # it has no exact rows

    def truncate(self, slot: int, count: int) -> None:
        raise NotImplementedError

    def fork(self, slots: Sequence[int]) -> list[int]:
        return [self.free_slots.pop() for _ in slots]

    def free(self, slots: Sequence[int]) -> None:
        self.free_slots += slots


def schedule_timings(
    tokenizer: str | None, rows: Sequence[int], rounds: int, steps: int, folder: Path
) -> Iterator[Timing]:
    """Rounds of the scheduler with so many rows that all run: choice of tokens, text, events.

    The greedy ones include what every row needs; a sample is the mean of `steps` rounds.

    Raises:
        BenchError: the tokenizer cannot be used.
    """
    made = chosen_tokenizer(tokenizer, folder)
    for count in rows:
        for title, options in _OPTIONS.items():
            timing, load = Timing(f"schedule, {count} row{'s' if count > 1 else ''}, {title}", tokens=count), Load([])
            scheduler = running_scheduler(made, count, options, rounds * steps)
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(steps):
                    scheduler.round()
                timing.samples.append((time.perf_counter() - start) / steps)
            timing.foreign_load = load.foreign()
            yield timing


def running_scheduler(
    tokenizer: SentencePieceTokenizer, rows: int, options: dict[str, object], steps: int
) -> Scheduler:
    """A scheduler without its thread; each of its rows has at least `steps` tokens to go."""
    scheduler = Scheduler(InstantDecoder(rows, tokenizer.sp.GetPieceSize()), tokenizer)
    never = _VOCABULARY - 1  # is not in the vocabulary of the tokenizer
    config = GenerationConfig.from_dict(
        {"max_new_tokens": steps + rows + 2, "eos_token_id": never, "seed": 1, **options}
    )
    ids = list(range(_PROMPT))
    for _ in range(rows):
        scheduler.submit(Job(ids, config))
    for _ in range(rows):  # a prompt a round
        scheduler.round()
    return scheduler
