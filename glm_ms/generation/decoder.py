"""The slot interface between networks and decoding loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from glm_ms.generation.inputs import Prompt

_SMALLEST_CAPACITY = 64


class Decoder(Protocol):
    """A network that continues sequences, each in its slot.

    Sequences join (`add`, `fork`) and leave (`free`) between any two steps. A sequence gets the same tokens whatever
    the other slots contain.

    Attributes:
        slots: sequences at a time.
        vocab_size: V.
        exact_rows: whether `extend` and `truncate` work: a token gets the same bits in a step of any size.
    """

    slots: int
    vocab_size: int
    exact_rows: bool = False

    def add(self, prompts: Sequence[Prompt]) -> tuple[list[int], np.ndarray]:
        """Runs prompts in free slots. Returns those, and float32 [len(prompts), V], the logits after the last tokens.

        Raises:
            ValueError: too few free slots, or a prompt that is longer than a slot.
        """

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """Appends one token to each of some slots; the others do not change.

        Args:
            slots: distinct slots in use.
            tokens: int32 [len(slots)].

        Returns:
            Logits after these tokens, float32 [len(slots), V].

        Raises:
            ValueError: a slot is full.
        """

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Appends one or more tokens to each of some slots, with the results of as many steps.

        Args:
            slots: distinct slots in use.
            tokens: of each slot.

        Returns:
            For each slot the logits after each of its tokens, float32 [n, V].

        Raises:
            ValueError: a slot is full, or there are no exact rows.
        """
        raise ValueError("extend: this decoder takes one token of a slot at a time")

    def truncate(self, slot: int, count: int) -> None:
        """Drops the last tokens of a slot, of those that `step` and `extend` have appended.

        Raises:
            ValueError: there are fewer, or no exact rows.
        """
        raise ValueError("truncate: this decoder keeps the tokens of a slot")

    def fork(self, slots: Sequence[int]) -> list[int]:
        """Copies slots, each as often as it is given, to free slots; returns those.

        Raises:
            ValueError: too few free slots.
        """

    def free(self, slots: Sequence[int]) -> None:
        """Ends sequences; their slots take new ones."""


def cache_capacity(length: int) -> int:
    """Tokens per slot of the decoder for sequences of up to `length`: a power of two, as each size is compiled."""
    capacity = _SMALLEST_CAPACITY
    while capacity < length:
        capacity *= 2
    return capacity


def slot_count(rows: int) -> int:
    """Slots of the decoder that serves `rows` sequences: 1, 2, 3, 4, 6, 8, 12, 16, ...

    Few sizes bound the number of graphs, and less than a third of the slots of a step are idle.
    """
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power > 2 and rows <= power * 3 // 4 else power
