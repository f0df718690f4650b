"""Steps of several tokens: proposals run with the step that would compute their first one, and are verified there.

Source: Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192, with proposals of `glm_ms.generation.lookup`. Each token is chosen as without: from the logits of its
place, with the options and the random stream of its row. A proposal counts as far as it is what was chosen. So nothing
but time depends on it, provided that the decoder gives a token the same bits in a step of any size (`exact_rows`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Callable, Protocol

import numpy as np

from glm_ms.generation.lookup import Lookup

# Price of a proposed token in steps, before it is measured.
_FIRST_PRICE = 0.1
# It costs something even where no cost can be measured.
_LEAST_PRICE = 0.02
# Durations that a price is made of; the lower middle one counts, as the first of them may include a compilation.
_LAST = 9
# The first steps of so many sequences have no proposals, nor has every 32nd one: their duration is measured.
_FIRST_STEPS, _EVERY = 2, 32


class ExtendingDecoder(Protocol):
    """What steps of several tokens need of a decoder."""

    @property
    def exact_rows(self) -> bool: ...

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray: ...

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def truncate(self, slot: int, count: int) -> None: ...


@dataclass(frozen=True)
class Row:
    """A sequence in a step: its slot, the token that was chosen last, which the decoder does not have yet, and the
    `Lookup` of all its tokens, this one included; None: it gets no proposals."""

    slot: int
    token: int
    lookup: Lookup | None


@dataclass
class Totals:
    """Numbers of proposals, of their tokens, and of those that were right."""

    proposals: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass
class _Cost:
    """Seconds of the last steps of so many sequences."""

    steps: int = 0
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))
    extra: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST))  # of each proposed token

    def price(self) -> float:
        """Of a proposed token, in steps without proposals."""
        if not self.extra:
            return _FIRST_PRICE
        return max(median_low(self.extra) / max(median_low(self.plain), 1e-9), _LEAST_PRICE)


class Step:
    """The logits of a step, and the way from each token that is chosen to the next ones.

    Choose the token of row i from `scores[i]`. Then give it to `after`, which may return the logits for one more token,
    and so on. A row that ends with a token does not ask `after`.

    Attributes:
        scores: for each row float32 [V].
    """

    def __init__(self, rows: Sequence[Row], drafts: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> None:
        self._rows, self._drafts, self._blocks = rows, drafts, blocks
        self.scores = [block[0] for block in blocks]
        self._right, self._refused = [0] * len(rows), [False] * len(rows)

    def after(self, number: int, token: int) -> np.ndarray | None:
        """The logits after a token that row `number` has chosen, float32 [V]; None: the next step has them."""
        row, draft, right = self._rows[number], self._drafts[number], self._right[number]
        if row.lookup is not None:
            row.lookup.append(token)
        if right == len(draft):
            return None
        if draft[right] != token:
            self._refused[number] = True
            return None
        self._right[number] = right + 1
        return self._blocks[number][right + 1]

    def settle(self, decoder: ExtendingDecoder, number: int, runs: bool, totals: Totals) -> None:
        """Drops from the slot of row `number` what was proposed in vain, unless the row has ended."""
        row, draft, right = self._rows[number], self._drafts[number], self._right[number]
        if row.lookup is None or not draft:
            return
        row.lookup.learn(right, self._refused[number])
        totals.proposals += 1
        totals.proposed += len(draft)
        totals.accepted += right
        if runs and right < len(draft):
            decoder.truncate(row.slot, len(draft) - right)


class Speculation:
    """Makes the steps of a decoding loop, with proposals where these save time.

    Args:
        clock: seconds.

    Attributes:
        totals: of all steps.
    """

    def __init__(self, decoder: ExtendingDecoder, clock: Callable[[], float] = time.perf_counter) -> None:
        self._decoder, self._clock = decoder, clock
        self._costs: dict[int, _Cost] = {}  # by the number of sequences
        self.totals = Totals()

    def lookup(self, ids: Sequence[int], most: int, limit: int) -> Lookup | None:
        """For a sequence of this decoder, see `Lookup`; None if it gets no proposals: `most` is 0, or the decoder has
        no exact rows."""
        return Lookup(ids, most, limit) if most and self._decoder.exact_rows else None

    def step(self, rows: Sequence[Row]) -> Step:
        """Appends the tokens of all rows, and proposals. Call `settle` when the next tokens have been chosen."""
        cost = self._costs.setdefault(len(rows), _Cost())
        drafts = self._propose(rows, cost)
        slots, count = [row.slot for row in rows], sum(map(len, drafts))
        cost.steps += 1
        start = self._clock()
        if count:
            blocks = self._decoder.extend(slots, [[row.token, *draft] for row, draft in zip(rows, drafts)])
            cost.extra.append((self._clock() - start - median_low(cost.plain)) / count)
            return Step(rows, drafts, blocks)
        scores = self._decoder.step(slots, np.array([row.token for row in rows], np.int32))
        cost.plain.append(self._clock() - start)
        return Step(rows, drafts, list(scores[:, None]))

    def settle(self, step: Step, number: int, runs: bool) -> None:
        """Ends what row `number` has of a step; `runs`: whether its slot is still in use."""
        step.settle(self._decoder, number, runs, self.totals)

    def _propose(self, rows: Sequence[Row], cost: _Cost) -> list[list[int]]:
        if cost.steps < _FIRST_STEPS or cost.steps % _EVERY == 0:
            return [[] for _ in rows]
        # A step gives each row a token. One more must not take more time than these do.
        price = len(rows) * cost.price()
        return [[] if row.lookup is None else row.lookup.propose(price) for row in rows]
