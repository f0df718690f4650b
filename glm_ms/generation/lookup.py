"""Prompt lookup: what followed the last tokens of a sequence where they occurred before (no MindSpore).

Source: A. Saxena, "Prompt Lookup Decoding", 2023; `prompt_lookup_num_tokens` of transformers is the same idea.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that must have occurred before, longest first. One alone says too little.
SIZES = (4, 3, 2)
# At first this share of the proposed tokens is expected to be right, by how many tokens occurred before; it counts as
# so many observed tokens. Measured on answers that repeat parts of their prompt.
_FIRST_SHARE = {4: 0.8, 3: 0.65, 2: 0.4}
_FIRST_WEIGHT = 2.0
# How much an observation counts after each later one: about the last ten count.
_FADING = 0.9
# Where proposals are not worth their price one token is proposed as a trial. Tokens until the next one, doubled each
# time until proposals are worth it again.
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128


class Share:
    """The share of right tokens among those that were proposed lately."""

    def __init__(self, first: float) -> None:
        self._right, self._count = first * _FIRST_WEIGHT, _FIRST_WEIGHT

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self._right / self._count

    def add(self, right: int, wrong: int) -> None:
        """Adds observations."""
        for one, times in ((1, right), (0, wrong)):
            for _ in range(times):
                self._right, self._count = self._right * _FADING + one, self._count * _FADING + 1


class Lookup:
    """The tokens of one sequence, and what is expected of proposals.

    Args:
        ids: so far.
        most: tokens of a proposal.
        limit: tokens that the sequence has at most; the last one is not proposed, as nothing follows it.
    """

    def __init__(self, ids: Sequence[int], most: int, limit: int) -> None:
        self._most, self._limit = most, limit
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # tokens -> index of the one after their last occurrence
        self._shares = {size: Share(_FIRST_SHARE[size]) for size in SIZES}
        self._size = 0  # of the last proposal
        self._trial = 0  # number of tokens from which the next trial may be made
        self._pause = _FIRST_PAUSE
        for token in ids:
            self.append(int(token))

    def append(self, token: int) -> None:
        """Adds the next token of the sequence."""
        place = len(self._ids)
        for size in SIZES:
            if place >= size:
                self._places[tuple(self._ids[place - size :])] = place
        self._ids.append(token)

    def propose(self, price: float) -> list[int]:
        """Tokens that may follow; often none.

        Args:
            price: the least probability of being right with which a token is worth its place in a step.
        """
        room = min(self._limit - len(self._ids) - 1, self._most)
        if room < 1:
            return []
        for size in SIZES:
            place = self._places.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if place is not None:
                self._size = size
                return self._following(place, self._worthwhile(size, room, price))
        return []

    def learn(self, right: int, refused: bool) -> None:
        """Takes note how many tokens of the last proposal were right, from its first on, and whether the next was
        wrong."""
        self._shares[self._size].add(right, int(refused))

    def _worthwhile(self, size: int, room: int, price: float) -> int:
        share = self._shares[size].value
        count, chance = 0, share
        while count < room and chance > price:
            count, chance = count + 1, chance * share
        if count:
            self._pause = _FIRST_PAUSE
        elif len(self._ids) >= self._trial:
            count, self._trial = 1, len(self._ids) + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return count

    def _following(self, place: int, count: int) -> list[int]:
        """The tokens from `place` on; behind the last one the sequence repeats from `place`."""
        period = len(self._ids) - place
        return [self._ids[place + number % period] for number in range(count)]
