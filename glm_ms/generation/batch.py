"""The running batch of a decoding loop: which prompt has which slots, and what becomes of them after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from glm_ms.generation.decoder import Decoder
from glm_ms.generation.lookup import Lookup
from glm_ms.generation.output_rows import Chosen, OutputRows
from glm_ms.generation.speculation import Row, Speculation, Step


@dataclass
class _Entry:
    """Rows with their slots, and for each of these the token to append and the source of proposals."""

    rows: OutputRows
    slots: list[int]
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    lookups: list[Lookup | None] = field(default_factory=list)

    def step_rows(self) -> list[Row]:
        """What a step needs."""
        return [Row(*one) for one in zip(self.slots, self.tokens.tolist(), self.lookups)]


class Batch:
    """Prompts in the slots of a decoder. `close` frees what they have, also after an error."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._speculation = decoder, Speculation(decoder)
        self._entries: list[_Entry] = []

    @property
    def running(self) -> int:
        """Prompts that have not ended."""
        return len(self._entries)

    @property
    def room(self) -> int:
        """Slots that no running prompt has or may need."""
        return self._decoder.slots - sum(entry.rows.width for entry in self._entries)

    @property
    def shortest(self) -> int:
        """Generated tokens of the shortest sequence that runs."""
        return min(length for entry in self._entries for length in entry.rows.lengths())

    def join(self, rows: Sequence[OutputRows]) -> list[OutputRows]:
        """Runs prompts and chooses their first tokens; returns those that have ended by it."""
        slots, scores = self._decoder.add([one.prompt for one in rows])
        new = [_Entry(one, [slot]) for one, slot in zip(rows, slots)]
        self._entries += new
        return self._place(new, [one.advance(own[None]) for one, own in zip(rows, scores)])

    def step(self) -> list[OutputRows]:
        """Appends the tokens that were chosen and chooses the next ones; returns the prompts that have ended."""
        entries, first = self._entries, 0
        step = self._speculation.step([row for entry in entries for row in entry.step_rows()])
        chosen: list[Chosen] = []
        for entry in entries:
            numbers = range(first, first + len(entry.slots))
            after = partial(_after, step, first)
            tokens, sources = entry.rows.advance(step.scores[first : numbers.stop], after)
            chosen.append((tokens, sources))
            for number in numbers:
                self._speculation.settle(step, number, runs=number - first in sources)
            first = numbers.stop
        return self._place(entries, chosen)

    def close(self) -> None:
        """Frees all slots."""
        self._decoder.free([slot for entry in self._entries for slot in entry.slots])
        self._entries = []

    def _place(self, entries: Sequence[_Entry], chosen: Sequence[Chosen]) -> list[OutputRows]:
        """Gives each sequence that runs a slot; returns the prompts that have ended."""
        ended: list[int] = []
        copied: list[tuple[_Entry, int]] = []
        for entry, (tokens, sources) in zip(entries, chosen):
            before, taken = entry.slots, set[int]()
            ended += [slot for place, slot in enumerate(before) if place not in sources]
            lookups = [entry.lookups[source] for source in sources] if entry.lookups else self._lookups(entry, tokens)
            entry.tokens, entry.slots, entry.lookups = tokens, [], lookups
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

    def _lookups(self, entry: _Entry, tokens: np.ndarray) -> list[Lookup | None]:
        """For the sequences of a prompt, which have one token each; none for beams, whose rows change places."""
        rows, config = entry.rows, entry.rows.config
        most = 0 if config.num_beams > 1 else config.prompt_lookup_num_tokens
        ids, limit = rows.prompt.ids.tolist(), len(rows.prompt.ids) + rows.limit
        return [self._speculation.lookup([*ids, token], most, limit) for token in tokens.tolist()]


def _after(step: Step, first: int, place: int, token: int) -> np.ndarray | None:
    """`Step.after` for the sequences of one prompt, of which the first is row `first` of the step."""
    return step.after(first + place, token)
