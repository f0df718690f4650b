"""A decoder for tests of the server: the slots of `PagedDecoder`, without a network and without MindSpore."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Callable

import numpy as np

from glm_ms.generation.pages import NoRoom
from glm_ms.serve.answer import Answer


@dataclass
class Held:
    """A sequence in a slot: all its ids, the length of its prompt, how many of its ids have run."""

    ids: list[int]
    prompt: int
    run: int
    adapter: str | None

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt :]


class FakeDecoder:
    """Scores are a function of a sequence alone.

    Args:
        scores: (ids so far, adapter) -> float32 [V]; None: random numbers that depend on both.
        chunk: tokens of a prompt that `prefill` runs.
        pages: of 4 tokens; fewer than slots and capacity need make `open` and `fork` raise NoRoom.

    Attributes:
        calls: ("open", slot), ("prefill", slot), ("step", slots), ("extend", slots, tokens), ("truncate", slot, count),
            ("fork", slots), ("free", slot), in order.
        exact_rows: whether `extend` and `truncate` may be called; set it to True for proposals.
        running: slot -> `Held`.
        broken: slots whose `prefill` raises, and names of methods that raise.
    """

    def __init__(
        self,
        vocab_size: int,
        slots: int = 4,
        capacity: int = 64,
        chunk: int = 8,
        scores: Callable[[list[int], str | None], np.ndarray] | None = None,
        pages: int | None = None,
    ) -> None:
        self.vocab_size, self.slots, self.capacity, self.chunk = vocab_size, slots, capacity, chunk
        self.pages_total = slots * -(-capacity // 4) if pages is None else pages
        self._scores = scores or self._random
        self.calls: list[tuple] = []
        self.running: dict[int, Held] = {}
        self.broken: set = set()
        self.exact_rows = False
        self.found: set[tuple] = set()  # prompts that have run: their full chunks are found again

    @property
    def pages_used(self) -> int:
        return sum(self._pages(len(one.ids)) for one in self.running.values())

    def _pages(self, tokens: int) -> int:
        return -(-tokens // 4)

    def _random(self, ids: list[int], adapter: str | None) -> np.ndarray:
        digest = hashlib.sha256(repr((ids, adapter)).encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return generator.standard_normal(self.vocab_size, np.float32) * 3

    def _check(self, name: object) -> None:
        if name in self.broken:
            raise RuntimeError(f"{name} is broken")

    def _slot(self) -> int:
        free = [slot for slot in range(self.slots) if slot not in self.running]
        if not free:
            raise NoRoom("no slot is free")
        return free[0]

    def open(self, ids: Sequence[int], adapter: str | None = None, positions: np.ndarray | None = None) -> int:
        self._check("open")
        if adapter == "unknown":
            raise ValueError("adapter 'unknown': not loaded")
        slot, ids = self._slot(), [int(token) for token in ids]
        if self.pages_used + self._pages(len(ids)) > self.pages_total:
            raise NoRoom("no page is free")
        cached = 0
        while cached + self.chunk < len(ids) and (adapter, *ids[: cached + self.chunk]) in self.found:
            cached += self.chunk
        self.running[slot] = Held(ids, len(ids), cached, adapter)
        self.calls.append(("open", slot))
        self._cached = {**getattr(self, "_cached", {}), slot: cached}
        return slot

    def cached(self, slot: int) -> int:
        return self._cached[slot]

    def prefill(self, slot: int, all_logits: bool = False) -> np.ndarray | None:
        one = self.running[slot]
        assert one.run < one.prompt, "the whole prompt has run"
        self.calls.append(("prefill", slot))
        self._check("prefill")
        self._check(slot)
        if all_logits and self._cached[slot]:
            one.run = self._cached[slot] = 0
        begin, one.run = one.run, min(one.run + self.chunk, one.prompt)
        if one.run % self.chunk == 0:
            self.found.add((one.adapter, *one.ids[: one.run]))
        if all_logits:
            return np.stack([self._scores(one.ids[: end + 1], one.adapter) for end in range(begin, one.run)])
        return self._scores(one.ids, one.adapter) if one.run == one.prompt else None

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        assert len(set(slots)) == len(slots)
        assert tokens.dtype == np.int32
        self.calls.append(("step", list(slots)))
        self._check("step")
        rows = []
        for slot, token in zip(slots, tokens.tolist()):
            one = self.running[slot]
            assert one.run == one.prompt, "a step before the end of the prompt"
            assert len(one.ids) < self.capacity, "a full slot"
            one.ids.append(token)
            rows.append(self._scores(one.ids, one.adapter))
        return np.stack(rows)

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
        assert self.exact_rows
        assert len(set(slots)) == len(slots)
        assert all(tokens)
        self.calls.append(("extend", list(slots), [list(some) for some in tokens]))
        self._check("step")
        blocks = []
        for slot, some in zip(slots, tokens):
            one, rows = self.running[slot], []
            assert one.run == one.prompt, "a step before the end of the prompt"
            assert len(one.ids) + len(some) <= self.capacity, "a full slot"
            for token in some:
                one.ids.append(token)
                rows.append(self._scores(one.ids, one.adapter))
            blocks.append(np.stack(rows))
        return blocks

    def truncate(self, slot: int, count: int) -> None:
        assert self.exact_rows
        self.calls.append(("truncate", slot, count))
        one = self.running[slot]
        assert 0 < count <= len(one.generated)
        del one.ids[-count:]

    def fork(self, slots: Sequence[int]) -> list[int]:
        self.calls.append(("fork", list(slots)))
        made: list[int] = []
        for slot in slots:
            one = self.running[slot]
            if len(self.running) == self.slots or self.pages_used + self._pages(len(one.ids)) > self.pages_total:
                self.free(made)
                raise NoRoom("no page is free")
            made.append(self._slot())
            self.running[made[-1]] = replace(one, ids=[*one.ids])
        return made

    def free(self, slots: Sequence[int]) -> None:
        self._check("free")
        for slot in slots:
            del self.running[slot]
            self.calls.append(("free", slot))


def scripted(vocab_size: int, prompt: Sequence[int], answer: Sequence[int]) -> Callable[..., np.ndarray]:
    """`scores` of a network that continues `prompt` with `answer`, whatever it is fed, and then repeats its end."""

    def scores(ids: list[int], adapter: str | None) -> np.ndarray:
        place = max(len(ids) - len(prompt), 0)
        return np.eye(vocab_size, dtype=np.float32)[answer[min(place, len(answer) - 1)]] * 50

    return scores


def collected(answer: Answer) -> dict[int, str]:
    """Of each choice its text, its tokens with their scores, its end and the reason, as text: nan equals nan there."""
    choices: dict[int, tuple] = {}
    for event in answer.events():
        text, tokens, _, _ = choices.get(event.choice, ("", (), None, None))
        choices[event.choice] = text + event.text, tokens + event.tokens, event.finish, event.stop_reason
    return {choice: repr(one) for choice, one in choices.items()}
