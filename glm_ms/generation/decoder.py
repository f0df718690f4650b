"""The slot interface between networks and decoding loops, and its implementation with a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from glm_ms.generation.graphs import MATRIX, VECTOR, on_graph_thread, run_cell
from glm_ms.generation.inputs import Prompt
from glm_ms.model.cache import CachedGLM, CopySlots, KVCache, WritePrefix
from glm_ms.model.glm import GLMNetwork

_SMALLEST_CAPACITY = 64
# Idle decoders kept per network. A run alternates between few sizes; each has a cache and its graphs.
_DECODERS_KEPT = 2


class Decoder(Protocol):
    """A network that continues sequences, each in its slot.

    Sequences join (`add`, `fork`) and leave (`free`) between any two steps. A sequence gets the same tokens whatever
    the other slots contain.
    """

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

    def fork(self, slots: Sequence[int]) -> list[int]:
        """Copies slots, each as often as it is given, to free slots; returns those.

        Raises:
            ValueError: too few free slots.
        """

    def reorder(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        """Slot slots[i] becomes what slot sources[i] was, for all i at once (beam search)."""

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


class CachedDecoder(Decoder):
    """A KV cache of fixed size with two graphs: one runs prompts, one steps all slots.

    A step also runs the slots that it does not append to. Such a slot writes to its next index, which it cannot see
    and which its next token overwrites.

    Args:
        network: weights; shared, not copied.
        capacity: most tokens of a slot, prompt and new tokens.
    """

    def __init__(self, network: GLMNetwork, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        encoder = network.transformer.prefix_encoder
        # Indices in a slot begin with those of a P-Tuning prefix, positions do not.
        self._prefix = 0 if encoder is None else encoder.length
        self.cache = KVCache(network.config, slots, capacity + self._prefix)
        self._write_prefix = None if encoder is None else WritePrefix(encoder, self.cache)
        self._prefill = CachedGLM(network, self.cache)
        self._prefill.set_inputs(MATRIX, MATRIX, MATRIX, VECTOR, VECTOR, VECTOR)
        self._step = CachedGLM(network, self.cache)
        self._copy = CopySlots(self.cache)
        self._all = np.arange(slots)
        self.reset()

    @on_graph_thread
    def reset(self) -> None:
        """Frees every slot."""
        self._free = list(range(self.slots))
        self._used = np.full(self.slots, self._prefix)  # next index of each slot
        self._positions = np.zeros(self.slots, np.int64)  # position of the next token

    @on_graph_thread
    def add(self, prompts: Sequence[Prompt]) -> tuple[list[int], np.ndarray]:
        lengths = np.array([len(prompt.ids) for prompt in prompts])
        if lengths.max() > self.capacity:
            raise ValueError(f"a prompt of {lengths.max()} tokens: a slot has room for {self.capacity}")
        slots = np.array(self._take(len(prompts)))
        if self._write_prefix is not None:  # each time: the weights of the prefix may have changed
            indices = np.tile(np.arange(self._prefix), (self.slots, 1))
            run_cell(self._write_prefix, self.cache.rows(self._all, indices))
        batch, length = len(prompts), lengths.max()
        ids, positions = np.zeros((2, batch, length), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]], positions[row, : lengths[row]] = prompt.ids, prompt.positions
        indices = np.tile(self._prefix + np.arange(length), (batch, 1))
        self._used[slots] = self._prefix + lengths
        self._positions[slots] = [prompt.positions[-1] + 1 for prompt in prompts]
        rows, last = self.cache.rows(slots, indices), np.arange(batch) * length + lengths - 1
        logits = run_cell(self._prefill, ids, positions, indices, rows, slots, last).asnumpy()
        return slots.tolist(), logits

    @on_graph_thread
    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        slots, room = list(slots), self.cache.capacity
        for slot in slots:
            if self._used[slot] >= room:
                raise ValueError(f"slot {slot} is full: it has room for {self.capacity} tokens")
        ids, positions = np.zeros((2, self.slots, 1), np.int32)
        ids[slots, 0], positions[slots, 0] = tokens, self._positions[slots]
        indices = np.minimum(self._used, room - 1)[:, None]
        self._used[slots] += 1
        self._positions[slots] += 1
        rows = self.cache.rows(self._all, indices)
        logits = run_cell(self._step, ids, positions, indices, rows).asnumpy()
        return logits if slots == list(range(self.slots)) else logits[slots]

    @on_graph_thread
    def fork(self, slots: Sequence[int]) -> list[int]:
        targets = self._take(len(slots))
        self.reorder(targets, slots)
        return targets

    @on_graph_thread
    def reorder(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        order = self._all.copy()
        order[slots] = sources
        self._used, self._positions = self._used[order], self._positions[order]
        run_cell(self._copy, order)

    def free(self, slots: Sequence[int]) -> None:
        self._free += map(int, slots)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise ValueError(f"{count} sequences for {len(self._free)} free slots of {self.slots}")
        self._free.sort()
        taken, self._free = self._free[:count], self._free[count:]
        return taken


class DecoderPool:
    """Lends compiled decoders, so that calls of similar size do not compile again.

    No two borrowers share a decoder: streams that run at the same time have their own caches.
    """

    def __init__(self, network: GLMNetwork) -> None:
        self._network = network
        self._idle: list[CachedDecoder] = []

    @contextmanager
    def lend(self, rows: int, length: int) -> Iterator[CachedDecoder]:
        """A decoder with slots for `rows` sequences of `length` tokens, of the sizes that are compiled."""
        decoder = self._take(slot_count(rows), cache_capacity(length))
        try:
            yield decoder
        finally:
            # List operations are atomic. A lock could deadlock: the garbage collector closes abandoned streams, in
            # any thread and at any place.
            self._idle.append(decoder)
            del self._idle[:-_DECODERS_KEPT]

    def _take(self, slots: int, capacity: int) -> CachedDecoder:
        for decoder in [*self._idle]:
            if (decoder.slots, decoder.capacity) == (slots, capacity):
                try:
                    self._idle.remove(decoder)
                except ValueError:  # another thread was faster
                    continue
                decoder.reset()  # queued behind what an interrupted borrower may have left in the graph thread
                return decoder
        return CachedDecoder(self._network, slots, capacity)
