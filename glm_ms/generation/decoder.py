"""The slot interface between networks and decoding loops, and its implementation with a KV cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from mindspore import Tensor

from glm_ms.generation.graphs import MATRIX, VECTOR, on_graph_thread, run_cell
from glm_ms.generation.inputs import Prompt
from glm_ms.model.cache import CachedGLM, CopySlots, KVCache, WritePrefix
from glm_ms.model.glm import GLMNetwork

_SMALLEST_CAPACITY = 64


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


class DecoderGraphs:
    """The compiled cells for caches of one size. All decoders of this size run them, each with its own memory.

    A graph is compiled for the tables of `cache`, and reads their memory at each run. So a decoder needs no graphs of
    its own: before it runs, its memory becomes that of the tables, without a copy.

    Args:
        network: weights; shared, not copied.
        capacity: most tokens of a slot, prompt and new tokens.
    """

    def __init__(self, network: GLMNetwork, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        encoder = network.transformer.prefix_encoder
        # Indices in a slot begin with those of a P-Tuning prefix, positions do not.
        self.prefix = 0 if encoder is None else encoder.length
        self.cache = KVCache(network.config, slots, capacity + self.prefix)
        self.write_prefix = None if encoder is None else WritePrefix(encoder, slots, self.cache)
        self.prefill = CachedGLM(network, self.cache)
        self.prefill.set_inputs(MATRIX, MATRIX, MATRIX, VECTOR, VECTOR, VECTOR)
        self.step = CachedGLM(network, self.cache)
        self.copy = CopySlots(self.cache)
        self._memory: list[Tensor] | None = None  # of the tables; None: that they were made with
        self._owner: Callable[[], CachedDecoder | None] = lambda: None
        self.sound = True  # whether the memory can serve another decoder

    def serve(self, decoder: CachedDecoder) -> None:
        """Gives the tables the memory of a decoder; call it in the graph thread, before each use of the cells.

        A new decoder takes the memory of one that has ended, or gets its own. What others have left there has the
        weight 0 for its tokens, which hides all numbers but NaN and infinity.
        """
        if not decoder.memory:
            free = self._memory if self._owner() is None and self.sound else None
            decoder.memory = free or self.cache.zeros()
        if decoder.memory is not self._memory:
            self._set(decoder.memory)
        self._owner, self.sound = weakref.ref(decoder), decoder.sound

    def fill_prefix(self) -> None:
        """Writes the keys and values of the prefix, if there is one, at the start of every slot of the tables."""
        if self.write_prefix is not None:
            indices = np.tile(np.arange(self.prefix), (self.slots, 1))
            run_cell(self.write_prefix, self.cache.rows(np.arange(self.slots), indices))

    @on_graph_thread
    def release(self) -> None:
        """Frees the memory of the tables if its decoder has ended. Fresh zeros take none before they are written."""
        if self._memory and self._owner() is None:
            self._set(self.cache.zeros())
            self._memory = None

    def _set(self, memory: list[Tensor]) -> None:
        for table, content in zip(self.cache.tables, memory):
            table.set_data(content)
        self._memory = memory


class CachedDecoder(Decoder):
    """Sequences in slots of a KV cache. One graph runs prompts, another one steps all slots.

    A step also runs the slots that it does not append to. Such a slot writes to its next index, which it cannot see
    and which its next token overwrites.
    """

    def __init__(self, graphs: DecoderGraphs) -> None:
        self.graphs, self.cache = graphs, graphs.cache
        self.slots, self.capacity = graphs.slots, graphs.capacity
        self.memory: list[Tensor] = []  # of the tables of the cache; set by `DecoderGraphs.serve`
        self.sound = True  # no logit was NaN or infinite
        self._all = np.arange(self.slots)
        self.reset()

    @on_graph_thread
    def reset(self) -> None:
        """Frees every slot."""
        self._free = list(range(self.slots))
        self._used = np.full(self.slots, self.graphs.prefix)  # next index of each slot
        self._positions = np.zeros(self.slots, np.int64)  # position of the next token

    @on_graph_thread
    def add(self, prompts: Sequence[Prompt]) -> tuple[list[int], np.ndarray]:
        lengths = np.array([len(prompt.ids) for prompt in prompts])
        if lengths.max() > self.capacity:
            raise ValueError(f"a prompt of {lengths.max()} tokens: a slot has room for {self.capacity}")
        slots, prefix = np.array(self._take(len(prompts))), self.graphs.prefix
        self.graphs.serve(self)
        self.graphs.fill_prefix()  # each time: its weights may have changed
        batch, length = len(prompts), lengths.max()
        ids, positions = np.zeros((2, batch, length), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]], positions[row, : lengths[row]] = prompt.ids, prompt.positions
        indices = np.tile(prefix + np.arange(length), (batch, 1))
        self._used[slots] = prefix + lengths
        self._positions[slots] = [prompt.positions[-1] + 1 for prompt in prompts]
        rows, last = self.cache.rows(slots, indices), np.arange(batch) * length + lengths - 1
        logits = run_cell(self.graphs.prefill, ids, positions, indices, rows, slots, last).asnumpy()
        return slots.tolist(), self._noted(logits)

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
        self.graphs.serve(self)
        logits = self._noted(run_cell(self.graphs.step, ids, positions, indices, rows).asnumpy())
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
        self.graphs.serve(self)
        run_cell(self.graphs.copy, order)

    def _noted(self, logits: np.ndarray) -> np.ndarray:
        """The logits of a run; notes whether they are finite."""
        self.sound = self.graphs.sound = self.sound and bool(np.isfinite(logits).all())
        return logits

    def free(self, slots: Sequence[int]) -> None:
        self._free += map(int, slots)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise ValueError(f"{count} sequences for {len(self._free)} free slots of {self.slots}")
        self._free.sort()
        taken, self._free = self._free[:count], self._free[count:]
        return taken


class DecoderPool:
    """Makes decoders. Those of a size share compiled graphs, so that only the first one of a size compiles."""

    def __init__(self, network: GLMNetwork) -> None:
        self._network = network
        self._graphs: dict[tuple[int, int], DecoderGraphs] = {}

    def decoder(self, rows: int, length: int) -> CachedDecoder:
        """A decoder with slots for `rows` sequences of `length` tokens, of the sizes that are compiled.

        Idle sizes give their memory back: it may be large, and graphs are kept for as long as the network.
        """
        size = slot_count(rows), cache_capacity(length)
        graphs = self._graphs.get(size) or self._graphs.setdefault(size, DecoderGraphs(self._network, *size))
        for other in [*self._graphs.values()]:
            if other is not graphs:
                other.release()
        return CachedDecoder(graphs)
