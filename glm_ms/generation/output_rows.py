"""The output rows of one prompt while it is decoded: greedy and sampled ones, and what all ways have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Callable

import numpy as np

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.sampling import RowSampler, row_generator

# (number of a sequence in a step, its next token) -> float32 [V], the logits after that, if they are there already
After = Callable[[int, int], "np.ndarray | None"]
# The tokens of the sequences that still run, int32 [m], and for each of them which of those before it continues.
Chosen = tuple[np.ndarray, list[int]]


def unknown(number: int, token: int) -> None:
    """The `After` of a step without proposals."""


class OutputRows(ABC):
    """The sequences that continue one prompt.

    Attributes:
        prompt, config, number: the prompt, how it is decoded, and its number among others.
        limit: most new tokens of a sequence.
        width: slots that it may need from now on.
    """

    width: int

    def __init__(self, prompt: Prompt, config: GenerationConfig, number: int, limit: int) -> None:
        self.prompt, self.config, self.number, self.limit = prompt, config, number, limit

    @abstractmethod
    def advance(self, scores: Sequence[np.ndarray], after: After = unknown) -> Chosen:
        """Takes a step.

        Args:
            scores: n times float32 [V], of the sequences that run; the first time of the prompt, n = 1.
            after: for sequences that may take several tokens at a time. It is asked after each token that ends none.

        Returns:
            The tokens of those that still run, int32 [m], and for each of them which of the n it continues. With m = 0
            all have ended.
        """

    @abstractmethod
    def lengths(self) -> list[int]:
        """Generated tokens so far of each sequence that runs."""

    @abstractmethod
    def results(self) -> list[list[int]]:
        """The generated ids of `num_return_sequences` sequences, end tokens included, after the end."""


class SampledRows(OutputRows):
    """Greedy decoding or sampling; each sequence draws from its own random stream.

    Args:
        copy: how many sequences of the same prompt and config come before, see `copy_numbers`.
        first_row: number of the first row, for errors.

    Attributes:
        sequences: what they have so far.
    """

    def __init__(
        self, prompt: Prompt, config: GenerationConfig, number: int, limit: int, vocab_size: int, copy: int,
        first_row: int
    ) -> None:  # fmt: skip
        super().__init__(prompt, config, number, limit)
        self.width, self.first_row = config.num_return_sequences, first_row
        self.sequences: list[list[int]] = [[] for _ in range(self.width)]
        self._running = list(range(self.width))
        self._samplers = [
            RowSampler(
                config, prompt.ids, vocab_size, row_generator(prompt.ids, config.seed, copy + row), first_row + row
            )
            for row in self._running
        ]

    def advance(self, scores: Sequence[np.ndarray], after: After = unknown) -> Chosen:
        places = range(len(self._running)) if len(scores) == len(self._running) else [0] * len(self._running)
        running, tokens, sources = list[int](), list[int](), list[int]()
        for row, place in zip(self._running, places):
            following: np.ndarray | None = scores[place]
            while following is not None:
                token = self._samplers[row](following)
                self.sequences[row].append(token)
                if token in self.config.eos_ids or len(self.sequences[row]) == self.limit:
                    break
                following = after(place, token)
            else:
                running.append(row)
                tokens.append(token)
                sources.append(place)
        self._running, self.width = running, len(running)
        return np.array(tokens, np.int32), sources

    def lengths(self) -> list[int]:
        return [len(self.sequences[row]) for row in self._running]

    def results(self) -> list[list[int]]:
        return self.sequences
