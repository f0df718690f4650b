"""What compiled graphs give to a `PagedDecoder`: runs over pages, their sizes and memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_ms.generation.pages import PAGE
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.cpu.rows import Span
from glm_ms.peft.rows import AdapterBounds, RowAdapters

if TYPE_CHECKING:
    from glm_ms.generation.paged import PagedDecoder

# Tokens of a prompt that run at a time while others are answered: enough to use the arithmetic of a CPU, few enough
# that running answers wait for only a moment.
CHUNK = 32


def pages_of(tokens: int) -> int:
    """Pages for so many tokens."""
    return -(-tokens // PAGE)


class PageGraphs(ABC):
    """Compiled graphs for decoders of one size. Its decoders run them, each with its own memory.

    Args:
        network: weights; shared, not copied.
        slots: sequences at a time.
        capacity: most tokens of one, prompt and new tokens.
        chunk: most tokens of a prompt that run at a time while other sequences step; a multiple of `PAGE`.
        bounds: adapters that sequences may have; None: only that of the network, if it has one.

    Attributes:
        vocab_size: V.
        largest_chunk: most tokens of a prompt that run at a time while no other sequence steps.
        exact_rows: a token gets the same bits in a run of any size and at any place of it. So a step can have several
            tokens of a sequence, and the pages that steps have written are those of a prompt with the same tokens.
        found_in: tokens of pages that are found together, a multiple of `PAGE`.
        prefix_pages, first: pages of the P-Tuning prefix of the network, and the index of its first token there: it
            ends where a page ends. All sequences share these pages.
        pages_of_slot, pages: pages of one sequence, and of all of them together.
        adapters: those of sequences.
        sound: whether the memory of a decoder can serve another one.
    """

    exact_rows = False

    def __init__(
        self, network: GLMNetwork, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None
    ) -> None:
        if chunk % PAGE:
            raise ValueError(f"chunk = {chunk}: must be a multiple of {PAGE}, the tokens of a page")
        self.slots, self.capacity, self.chunk = slots, capacity, chunk
        self.largest_chunk = self.found_in = chunk
        self.vocab_size = network.config.padded_vocab_size
        encoder = network.transformer.prefix_encoder
        self.prefix = 0 if encoder is None else encoder.length
        self.prefix_pages = pages_of(self.prefix)
        self.first = self.prefix_pages * PAGE - self.prefix
        self.bounds = bounds or AdapterBounds()
        other_prefix = pages_of(self.bounds.max_prefix)
        self.pages_of_slot = self.prefix_pages + other_prefix + pages_of(capacity)
        self.pages = slots * pages_of(capacity) + self.prefix_pages + self.bounds.max_adapters * other_prefix
        self.adapters: RowAdapters
        self.sound = True

    @abstractmethod
    def compile(self, decoder: PagedDecoder) -> None:
        """Compiles everything; nothing compiles afterwards. The sequences of `decoder` do not change."""

    @abstractmethod
    def serve(self, decoder: PagedDecoder) -> Any:
        """The memory of a decoder, ready for the other methods, which are of this decoder until the next call."""

    @abstractmethod
    def release(self) -> None:
        """Frees memory that no decoder uses."""

    @abstractmethod
    def read(self, span: Span) -> tuple[np.ndarray, bool]:
        """Runs a chunk of a prompt. Returns the wanted logits, float32 [n, V], and whether all numbers are finite."""

    @abstractmethod
    def step(self, places: Sequence[int], spans: Sequence[Span]) -> tuple[np.ndarray, Sequence[bool]]:
        """Runs one token of each of some sequences, whose slots are `places`. Returns the logits of each, float32
        [n, V], and whether they are finite."""

    def extend(self, spans: Sequence[Span]) -> tuple[np.ndarray, Sequence[bool]]:
        """Runs several tokens of each of some sequences. Returns the logits of all, float32 [n, V], and for each
        sequence whether all are finite. Only with `exact_rows`."""
        raise ValueError("several tokens of a sequence at a time need rows with equal bits (the C++ kernels)")

    @abstractmethod
    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages: (source, target) of each; no source is a target."""

    @abstractmethod
    def write(self, page: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Overwrites a page by keys and values, float32 [layers, PAGE, G, D] each."""
