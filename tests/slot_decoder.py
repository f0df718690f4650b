"""Slots for the decoding loops without a cache: a base class for decoders of tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass
class Row:
    """A sequence: its ids, their positions, the number of its prompt in `add`, the length of that prompt."""

    ids: list[int]
    positions: list[int]
    number: int
    prompt_length: int


class SlotDecoder:
    """A `glm_ms.generation.decoder.Decoder`. A subclass computes `scores(rows)`, float32 [len(rows), V].

    Attributes:
        slots: as many as a test may need; `vocab_size` is that of the subclass.
        rows: slot -> `Row`; empty after every run that frees what it has added.
        exact_rows: whether `extend` and `truncate` may be called; set it to True for proposals.
        calls: names of the methods that were called, and `fed`, `positions`: what each step appended.
    """

    slots = 1000
    exact_rows = False

    def __init__(self):
        self.rows, self.calls, self.fed, self.positions = {}, [], [], []

    def add(self, prompts):
        slots = []
        for number, prompt in enumerate(prompts):
            assert prompt.ids.dtype == prompt.positions.dtype == np.int32
            row = Row(prompt.ids.tolist(), prompt.positions.tolist(), number, len(prompt.ids))
            slots.append(self._put(row))
        return slots, self.scores([self.rows[slot] for slot in slots])

    def step(self, slots, tokens):
        assert len(set(slots)) == len(slots)
        assert tokens.dtype == np.int32
        self.calls.append("step")
        rows = [self.rows[slot] for slot in slots]
        for row, token in zip(rows, tokens.tolist()):
            row.ids = [*row.ids, token]
            row.positions = [*row.positions, row.positions[-1] + 1]
        self.fed.append(tokens.tolist())
        self.positions.append([row.positions[-1] for row in rows])
        return self.scores(rows)

    def extend(self, slots, tokens):
        assert self.exact_rows
        assert len(set(slots)) == len(slots)
        self.calls.append("extend")
        blocks = []
        for slot, some in zip(slots, tokens):
            one, rows = self.rows[slot], []
            for token in some:
                one = replace(one, ids=[*one.ids, token], positions=[*one.positions, one.positions[-1] + 1])
                rows.append(one)
            self.rows[slot] = one
            blocks.append(self.scores(rows))
        return blocks

    def truncate(self, slot, count):
        assert self.exact_rows
        self.calls.append("truncate")
        one = self.rows[slot]
        assert 0 < count <= len(one.ids) - one.prompt_length
        self.rows[slot] = replace(one, ids=one.ids[:-count], positions=one.positions[:-count])

    def fork(self, slots):
        self.calls.append("fork")
        return [self._put(replace(self.rows[slot])) for slot in slots]

    def free(self, slots):
        for slot in slots:
            del self.rows[slot]

    def _put(self, row):
        slot = next(number for number in range(len(self.rows) + 1) if number not in self.rows)
        self.rows[slot] = row
        return slot
