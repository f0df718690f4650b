"""The running batch of a decoding loop: which prompt has which slots, and what becomes of them after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glm_ms.generation.decoder import Decoder
from glm_ms.generation.output_rows import OutputRows


@dataclass
class _Entry:
    """Rows with their slots, and the tokens to append to these."""

    rows: OutputRows
    slots: list[int]
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


class Batch:
    """Prompts in the slots of a decoder. `close` frees what they have, also after an error."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._entries: list[_Entry] = []

    @property
    def running(self) -> int:
        """Prompts that have not ended."""
        return len(self._entries)

    @property
    def room(self) -> int:
        """Slots that no running prompt has or may need."""
        return self._decoder.slots - sum(entry.rows.width for entry in self._entries)

    def join(self, rows: Sequence[OutputRows]) -> list[OutputRows]:
        """Runs prompts and chooses their first tokens; returns those that have ended by it."""
        slots, scores = self._decoder.add([one.prompt for one in rows])
        new = [_Entry(one, [slot]) for one, slot in zip(rows, slots)]
        self._entries += new
        return self._advance(new, scores)

    def step(self) -> list[OutputRows]:
        """Appends the tokens that were chosen and chooses the next ones; returns the prompts that have ended."""
        slots = [slot for entry in self._entries for slot in entry.slots]
        scores = self._decoder.step(slots, np.concatenate([entry.tokens for entry in self._entries]))
        return self._advance(self._entries, scores)

    def close(self) -> None:
        """Frees all slots."""
        self._decoder.free([slot for entry in self._entries for slot in entry.slots])
        self._entries = []

    def _advance(self, entries: Sequence[_Entry], scores: np.ndarray) -> list[OutputRows]:
        """Gives each prompt its part of float32 [slots, V], and each of its sequences a slot."""
        parts = np.split(scores, np.cumsum([len(entry.slots) for entry in entries])[:-1])
        steps = [entry.rows.advance(part) for entry, part in zip(entries, parts)]
        ended: list[int] = []
        copied: list[tuple[_Entry, int]] = []
        for entry, (tokens, sources) in zip(entries, steps):
            before, taken = entry.slots, set[int]()
            ended += [slot for place, slot in enumerate(before) if place not in sources]
            entry.tokens, entry.slots = tokens, []
            for index, source in enumerate(sources):
                entry.slots.append(before[source])
                if source in taken:  # a second sequence continues it, in a copy
                    copied.append((entry, index))
                taken.add(source)
        if ended:
            self._decoder.free(ended)
        if copied:
            copies = self._decoder.fork([entry.slots[index] for entry, index in copied])
            for (entry, index), slot in zip(copied, copies):
                entry.slots[index] = slot
        self._entries = [entry for entry in self._entries if entry.slots]
        return [entry.rows for entry in entries if not entry.slots]
