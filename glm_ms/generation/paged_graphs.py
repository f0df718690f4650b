"""`PagedGraphs`: runs over pages by the portable cells of the network, on any device."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from glm_ms.generation.graphs import on_graph_thread, run_cell
from glm_ms.generation.page_graphs import CHUNK, PageGraphs
from glm_ms.generation.pages import PAGE, RESERVED, SCRATCH, ZEROS
from glm_ms.generation.uniform import uniform_rows
from glm_ms.model.cache import BlockCache, CopyPages, KVCache, OutputLayer, PagedGLM, WritePage, WritePrefix
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.cpu.rows import Span
from glm_ms.peft.rows import NO_ADAPTER, AdapterBounds, RowAdapters

if TYPE_CHECKING:
    from glm_ms.generation.paged import PagedDecoder


class PagedGraphs(PageGraphs):
    """The compiled cells for one size.

    A graph is compiled for the tables of `cache`, and reads their memory at each run. So a decoder needs no graphs of
    its own: before it runs, its memory becomes that of the tables, without a copy.

    Products of matrices differ in the last digits with the number of rows and, for some numbers, with the place of a
    row. So a chunk always begins at a multiple of its size, where pages are found too: a token of a prompt is always
    in the same place. A step has a number of rows whose places are equal (`uniform_rows`), and its pages are not
    found, as a prompt with the same tokens has other digits. A step also runs the slots that it does not append to.
    These write to a page of nobody.
    """

    def __init__(
        self, network: GLMNetwork, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None
    ) -> None:
        super().__init__(network, slots, capacity, chunk, bounds)
        self.network = network
        self.rows = uniform_rows(slots)  # of a step; those beyond the slots are idle
        encoder = network.transformer.prefix_encoder
        # `WritePrefix` writes to flat tables.
        attention = network.transformer.encoder.layers[0].self_attention.cached_attention
        whole = attention.whole_pages and encoder is None
        self.cache = (BlockCache if whole else KVCache)(network.config, RESERVED + self.pages, PAGE)
        self.adapters = RowAdapters(network, self.bounds, PAGE if whole else 1)
        total = self.pages_of_slot * PAGE
        self.prefill_cell, self.step_cell = (PagedGLM(network, self.cache, total) for _ in range(2))
        self.write_prefix = None if encoder is None else WritePrefix(encoder, 1, self.cache)
        self.output_cell, self.copy_cell = OutputLayer(network), CopyPages(self.cache)
        self.write_cell = WritePage(self.cache)
        self._memory: list[Tensor] | None = None  # of the tables; None: that they were made with
        self._owner: Callable[[], PagedDecoder | None] = lambda: None

    def compile(self, decoder: PagedDecoder) -> None:
        """Also warns if the rows of a step differ on this machine though they run the same token."""
        decoder.serve()
        logits = self._run_step([], [])
        if len({row.tobytes() for row in logits}) > 1:
            warnings.warn(
                f"a step of {len(logits)} rows gives the same token other digits in other rows on this machine: by "
                "rounding answers may depend on what else runs; try another number of slots",
                UserWarning,
                stacklevel=2,
            )
        nobody = np.zeros(1, np.int32)
        span = Span(nobody, nobody, 0, 0, self._empty_table(), NO_ADAPTER, 0)
        _, states = self._run_chunk(span)
        self._logits_of(states, 0, NO_ADAPTER)
        self.copy([(ZEROS, SCRATCH)])
        if self.bounds.max_prefix:
            zeros = np.zeros((len(self.cache.keys), PAGE, self.cache.groups, self.cache.dim), np.float32)
            self.write(SCRATCH, zeros, zeros)

    def serve(self, decoder: PagedDecoder) -> list[Tensor]:
        """Gives the tables the memory of a decoder; call it in the graph thread, before each use of the cells.

        A new decoder takes the memory of one that has ended and was sound, or gets its own. What others have left
        there has the weight 0 for its tokens, which hides all numbers but NaN and infinity.
        """
        memory = decoder.memory
        if memory is None:
            free = self._memory if self._owner() is None and self.sound else None
            memory = free or self.cache.zeros()
            self._set(memory)
            if self.write_prefix is not None:
                indices = np.arange(self.first, self.first + self.prefix)[None]
                run_cell(self.write_prefix, self.cache.page_rows(RESERVED + indices // PAGE, indices % PAGE))
        elif memory is not self._memory:
            self._set(memory)
        self._owner, self.sound = weakref.ref(decoder), decoder.sound
        return memory

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

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for start in range(0, len(pairs), self.slots):
            due = pairs[start : start + self.slots]
            padded = np.full((self.slots, 2), SCRATCH)
            padded[: len(due)] = due
            run_cell(self.copy_cell, padded[:, 0], padded[:, 1])

    def write(self, page: int, keys: np.ndarray, values: np.ndarray) -> None:
        # The tables are those of all keys, then those of all values.
        content = np.ascontiguousarray(self.cache.page_content(np.concatenate((keys, values))), np.float32)
        number = Tensor(np.array([page], np.int32))
        self.write_cell.compile_and_run(number, Tensor(content, self.cache.keys[0].dtype))

    def read(self, span: Span) -> tuple[np.ndarray, bool]:
        logits, states = self._run_chunk(span)
        count = len(span.ids)
        if span.logits > 1:
            earlier = (self._logits_of(states, place, span.adapter) for place in range(count - span.logits, count - 1))
            found = np.concatenate([*earlier, logits])
        else:
            found = logits[: span.logits]
        return found, bool(np.isfinite(logits).all() and np.isfinite(found).all())

    def step(self, places: Sequence[int], spans: Sequence[Span]) -> tuple[np.ndarray, Sequence[bool]]:
        logits = self._run_step(places, spans)
        logits = logits if list(places) == list(range(len(logits))) else logits[list(places)]
        return logits, [bool(np.isfinite(row).all()) for row in logits]

    def _empty_table(self) -> np.ndarray:
        """Pages of a row without a sequence."""
        pages = np.full(self.pages_of_slot, ZEROS, np.int32)
        pages[0] = SCRATCH
        return pages

    def _run_chunk(self, span: Span) -> tuple[np.ndarray, Tensor]:
        """Logits float32 [1, V] after the last token, and the input of the output layer for all tokens."""
        count = len(span.ids)
        ids, positions = np.zeros((2, 1, self.chunk), np.int32)
        ids[0, :count], positions[0, :count] = span.ids, span.positions
        # Padding sees what the last token sees, and writes to a page of nobody.
        indices = np.minimum(np.arange(self.chunk), count - 1)[None] + span.index
        pages = span.pages[indices // PAGE]
        pages[0, count:] = SCRATCH
        rows = self.cache.page_rows(pages, np.where(pages == SCRATCH, 0, indices % PAGE))
        blocks = self.cache.page_blocks(span.pages[None])
        numbers, last = self._numbers([span.adapter]), np.array([count - 1])
        arrays = ids, positions, indices, np.array([span.first]), rows, blocks, numbers, last
        logits, states = run_cell(self.prefill_cell, *arrays)
        return logits.asnumpy(), states

    def _logits_of(self, states: Tensor, place: int, number: int) -> np.ndarray:
        """Logits float32 [1, V] of a token of a chunk, with the adapter of this number."""
        arrays = np.array([place], np.int32), self._numbers([number])
        inputs = [None if array is None else Tensor(array) for array in arrays]
        return self.output_cell.compile_and_run(states, *inputs).asnumpy()

    def _numbers(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Numbers of adapters for a graph; None: it has none."""
        return np.array(numbers, np.int32) if self.bounds.max_adapters else None

    def _run_step(self, places: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
        """Logits float32 [rows, V] after one token of each span, in the row of its place; other rows are idle."""
        ids, positions, indices, pages = np.zeros((4, self.rows, 1), np.int32)
        first, numbers = np.zeros(self.rows, np.int32), np.full(self.rows, NO_ADAPTER)
        tables = np.tile(self._empty_table(), (self.rows, 1))
        pages[:] = SCRATCH
        for place, span in zip(places, spans):
            ids[place], positions[place], indices[place], first[place] = (
                span.ids,
                span.positions,
                span.index,
                span.first,
            )
            pages[place], tables[place], numbers[place] = span.pages[span.index // PAGE], span.pages, span.adapter
        rows = self.cache.page_rows(pages, indices % PAGE)
        blocks = self.cache.page_blocks(tables)
        arrays = ids, positions, indices, first, rows, blocks, self._numbers(numbers)
        return run_cell(self.step_cell, *arrays).asnumpy()
