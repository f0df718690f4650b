"""The slot decoder over pages: sequences that join and leave, prompts in chunks, pages that sequences share."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from mindspore import Tensor

from glm_ms.generation.decoder import Decoder
from glm_ms.generation.graphs import on_graph_thread, run_cell
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.pages import PAGE, RESERVED, SCRATCH, ZEROS, NoRoom, PagePool, page_keys
from glm_ms.generation.uniform import uniform_rows
from glm_ms.model.cache import BlockCache, CopyPages, KVCache, OutputLayer, PagedGLM, WritePage, WritePrefix
from glm_ms.model.glm import GLMNetwork
from glm_ms.peft.adapter import StoredAdapter
from glm_ms.peft.rows import NO_ADAPTER, AdapterBounds, RowAdapter, RowAdapters

__all__ = ["CHUNK", "NoRoom", "PagedDecoder", "PagedGraphs"]

# Tokens of a prompt that run at a time: enough to use the arithmetic of a CPU, few enough that running answers wait
# for only a moment. Pages are found in groups of so many tokens.
CHUNK = 32


def pages_of(tokens: int) -> int:
    """Pages for so many tokens."""
    return -(-tokens // PAGE)


class PagedGraphs:
    """The compiled cells for one size. All decoders of this size run them, each with its own memory.

    A graph is compiled for the tables of `cache`, and reads their memory at each run. So a decoder needs no graphs of
    its own: before it runs, its memory becomes that of the tables, without a copy.

    Args:
        network: weights; shared, not copied.
        slots: sequences at a time.
        capacity: most tokens of one, prompt and new tokens.
        chunk: tokens of a prompt that run at a time; a multiple of `PAGE`.
        bounds: adapters that sequences may have; None: only that of the network, if it has one.
    """

    def __init__(
        self, network: GLMNetwork, slots: int, capacity: int, chunk: int = CHUNK, bounds: AdapterBounds | None = None
    ) -> None:
        if chunk % PAGE:
            raise ValueError(f"chunk = {chunk}: must be a multiple of {PAGE}, the tokens of a page")
        self.slots, self.capacity, self.chunk = slots, capacity, chunk
        self.vocab_size = network.config.padded_vocab_size
        self.rows = uniform_rows(slots)  # of a step; those beyond the slots are idle
        encoder = network.transformer.prefix_encoder
        # A P-Tuning prefix has its own pages, which all sequences share. It ends where a page ends.
        self.prefix = 0 if encoder is None else encoder.length
        self.prefix_pages = pages_of(self.prefix)
        self.first = self.prefix_pages * PAGE - self.prefix  # index of the first token of the prefix
        self.bounds = bounds or AdapterBounds()
        other_prefix = pages_of(self.bounds.max_prefix)
        self.pages_of_slot = self.prefix_pages + other_prefix + pages_of(capacity)
        self.pages = slots * pages_of(capacity) + self.prefix_pages + self.bounds.max_adapters * other_prefix
        # `WritePrefix` writes to flat tables.
        attention = network.transformer.encoder.layers[0].self_attention.cached_attention
        whole = attention.whole_pages and encoder is None
        self.cache = (BlockCache if whole else KVCache)(network.config, RESERVED + self.pages, PAGE)
        self.adapters = RowAdapters(network, self.bounds, PAGE if whole else 1)
        total = self.pages_of_slot * PAGE
        self.prefill, self.step = (PagedGLM(network, self.cache, total) for _ in range(2))
        self.write_prefix = None if encoder is None else WritePrefix(encoder, 1, self.cache)
        self.output, self.copy = OutputLayer(network), CopyPages(self.cache)
        self.write_page = WritePage(self.cache)
        self._memory: list[Tensor] | None = None  # of the tables; None: that they were made with
        self._owner: Callable[[], PagedDecoder | None] = lambda: None
        self.sound = True  # whether the memory can serve another decoder

    def serve(self, decoder: PagedDecoder) -> None:
        """Gives the tables the memory of a decoder; call it in the graph thread, before each use of the cells.

        A new decoder takes the memory of one that has ended and was sound, or gets its own. What others have left
        there has the weight 0 for its tokens, which hides all numbers but NaN and infinity.
        """
        if not decoder.memory:
            free = self._memory if self._owner() is None and self.sound else None
            decoder.memory = free or self.cache.zeros()
            self._set(decoder.memory)
            if self.write_prefix is not None:
                indices = np.arange(self.first, self.first + self.prefix)[None]
                run_cell(self.write_prefix, self.cache.page_rows(RESERVED + indices // PAGE, indices % PAGE))
        elif decoder.memory is not self._memory:
            self._set(decoder.memory)
        self._owner, self.sound = weakref.ref(decoder), decoder.sound

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


@dataclass
class _Running:
    """A sequence in a slot. Its tokens have the indices from `start` on."""

    ids: np.ndarray  # int32 [S], the prompt
    positions: np.ndarray  # int32 [S]
    first: int  # index of the first key that its tokens see
    start: int
    pages: np.ndarray  # int32 [pages of a slot], the pages of all indices; ZEROS from `count` on
    count: int
    keys: list[bytes]  # of the full pages of the prompt
    adapter: RowAdapter | None
    length: int = 0  # tokens whose keys and values are there
    found: int = 0  # of these, tokens of pages that others have computed
    position: int = 0  # of the next token

    @property
    def ready(self) -> bool:
        """Whether the whole prompt has run."""
        return self.length >= len(self.ids)

    @property
    def number(self) -> int:
        """Number of its adapter in the tables of `RowUpdate`."""
        return NO_ADAPTER if self.adapter is None else self.adapter.number


class PagedDecoder(Decoder):
    """Sequences over shared pages of one cache.

    A prompt runs in chunks, between which other sequences can step: `open`, then `prefill` until it returns logits.
    The pages of prompts are found again by their tokens, by those before them and by the adapter, for as long as no
    other sequence needs the memory.

    A sequence gets the same bits whatever the other slots do and whatever pages were found. For products of matrices
    differ in the last digits with the number of rows and, for some numbers, with the place of a row. So a chunk always
    begins at a multiple of its size, where pages are found too: a token of a prompt is always in the same place. A step
    has a number of rows whose places are equal (`uniform_rows`), and its pages are not found, as a prompt with the same
    tokens has other digits.

    While a decoder is in use the weights must not change; `reset` makes it forget everything. A step also runs the
    slots that it does not append to. These write to a page of nobody.

    Attributes:
        slots: sequences at a time.
        capacity: most tokens of a sequence, prompt and new tokens.
        pages_total, pages_used: pages of the cache, and those that sequences use now.
    """

    def __init__(self, graphs: PagedGraphs) -> None:
        self.graphs, self.cache = graphs, graphs.cache
        self.slots, self.capacity, self.vocab_size = graphs.slots, graphs.capacity, graphs.vocab_size
        self.memory: list[Tensor] = []  # of the tables of the cache; set by `PagedGraphs.serve`
        self.sound = True  # no logit was NaN or infinite
        self._running: dict[int, _Running] = {}
        self._prefixes: dict[RowAdapter, list[int]] = {}  # pages of the prefixes of adapters
        self.reset()

    @on_graph_thread
    def reset(self) -> None:
        """Frees every slot and forgets all pages, also those of a prefix."""
        self.memory = []
        for one in self._running.values():
            self._leave(one)
        self._pool = PagePool(self.graphs.pages)
        self._prefix = [self._pool.take() for _ in range(self.graphs.prefix_pages)]
        self._running.clear()
        self._free = list(range(self.slots))
        self._unclean: set[int] = set()  # pages that may contain NaN or infinity
        self._copies: list[tuple[int, int]] = []  # source and target of pages, before the next run
        self._prefixes.clear()
        for adapter in self.graphs.adapters.present():
            self._write_prefix(adapter)

    @property
    def pages_total(self) -> int:
        return self._pool.total

    @property
    def pages_used(self) -> int:
        return self._pool.used

    @on_graph_thread
    def compile(self) -> None:
        """Compiles all graphs; nothing compiles afterwards. Running sequences do not change.

        Warns:
            UserWarning: the rows of a step differ on this machine though they run the same token.
        """
        nobody = np.zeros((1, self.graphs.chunk), np.int32)
        logits = self._run_step([], np.zeros(0, np.int32))
        if len({row.tobytes() for row in logits}) > 1:
            warnings.warn(
                f"a step of {len(logits)} rows gives the same token other digits in other rows on this machine: by "
                "rounding answers may depend on what else runs; try another number of slots",
                UserWarning,
                stacklevel=2,
            )
        scratch = np.full_like(nobody, SCRATCH)
        _, states = self._run_chunk(nobody, nobody, nobody, 0, self._empty_table(), scratch, NO_ADAPTER, 0)
        self._logits_of(states, 0, NO_ADAPTER)
        self._copies.append((ZEROS, SCRATCH))
        self._copy()
        if self.graphs.bounds.max_prefix:
            self._write_page(SCRATCH, np.zeros((len(self.cache.tables), PAGE, self.cache.groups, self.cache.dim)))

    @on_graph_thread
    def load_adapter(self, name: str, stored: StoredAdapter) -> None:
        """Adds an adapter for sequences that are opened with its name. Nothing compiles, others do not change.

        Raises AdapterError, see `RowAdapters.load`.
        """
        self._write_prefix(self.graphs.adapters.load(name, stored))

    @on_graph_thread
    def unload_adapter(self, name: str) -> None:
        """Removes an adapter; sequences that have it keep it to their end. ValueError if it is not loaded."""
        self._drop(self.graphs.adapters.unload(name))

    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return self.graphs.adapters.names()

    @on_graph_thread
    def open(
        self, ids: Sequence[int] | np.ndarray, adapter: str | None = None, positions: np.ndarray | None = None
    ) -> int:
        """Takes a slot for a prompt and finds its pages; computes nothing.

        Args:
            ids: [S], 1 <= S <= capacity.
            adapter: None: that of the network, if it has one.
            positions: [S]; None: 0, 1, ...

        Raises:
            NoRoom: all slots are in use.
            ValueError: the prompt is empty or too long, or the adapter is unknown.
        """
        loaded = None if adapter is None else self.graphs.adapters.find(adapter)
        ids = np.array(ids, np.int32)
        if not 1 <= len(ids) <= self.capacity:
            raise ValueError(f"a prompt of {len(ids)} tokens: a slot has room for 1 to {self.capacity}")
        slot = self._take_slots(1)[0]
        positions = np.arange(len(ids), dtype=np.int32) if positions is None else np.array(positions, np.int32)
        prefix, first = self._prefix_of(loaded)
        pages = np.full(self.graphs.pages_of_slot, ZEROS, np.int32)
        pages[: len(prefix)] = prefix
        for page in prefix:
            self._pool.share(page)
        keys = list(page_keys(b"" if loaded is None else b"%d" % loaded.serial, ids, positions))
        start, position = len(prefix) * PAGE, int(positions[-1]) + 1
        one = _Running(ids, positions, first, start, pages, len(prefix), keys, loaded, position=position)
        if loaded is not None:
            loaded.rows += 1
        self._running[slot] = one
        self._find(one)
        return slot

    def cached(self, slot: int) -> int:
        """Tokens of the prompt in a slot whose pages were found."""
        return self._running[slot].found

    def ready(self, slot: int) -> bool:
        """Whether the whole prompt in a slot has run, so that it can step."""
        return self._running[slot].ready

    @on_graph_thread
    def prefill(self, slot: int, all_logits: bool = False) -> np.ndarray | None:
        """Runs the next chunk of the prompt in a slot.

        Args:
            all_logits: return the logits after every token; no page is found for this prompt then. Give the same value
                for all chunks of a prompt.

        Returns:
            float32 [V], the logits after the last token of the prompt; None if more chunks remain. With `all_logits`
            float32 [n, V], the logits after each of the n tokens of this chunk; `ready` says whether it was the last.

        Raises:
            ValueError: the whole prompt has run.
        """
        one = self._running[slot]
        if one.ready:
            raise ValueError(f"slot {slot}: its whole prompt has run")
        if all_logits and one.found:
            self._release_pages(one, one.start // PAGE)
            one.length = one.found = 0
        elif not all_logits:
            self._find(one)
        begin, chunk = one.length, self.graphs.chunk
        end = min(begin + chunk, len(one.ids))
        count = end - begin
        while one.count * PAGE < one.start + end:
            self._add_page(one)
        ids, positions = np.zeros((2, 1, chunk), np.int32)
        ids[0, :count], positions[0, :count] = one.ids[begin:end], one.positions[begin:end]
        # Padding sees what the last token sees, and writes to a page of nobody.
        indices = np.minimum(np.arange(chunk), count - 1)[None] + (one.start + begin)
        pages = one.pages[indices // PAGE]
        pages[0, count:] = SCRATCH
        logits, states = self._run_chunk(ids, positions, indices, one.first, one.pages, pages, one.number, count - 1)
        one.length = end
        if self._note(one, logits):
            for number in range(begin // PAGE, end // PAGE):
                self._pool.register(int(one.pages[one.start // PAGE + number]), one.keys[number])
        if all_logits:
            return np.concatenate([*(self._logits_of(states, place, one.number) for place in range(count - 1)), logits])
        return logits[0] if one.ready else None

    def add(self, prompts: Sequence[Prompt]) -> tuple[list[int], np.ndarray]:
        if len(prompts) > len(self._free):
            raise NoRoom(f"{len(prompts)} sequences for {len(self._free)} free slots of {self.slots}")
        slots: list[int] = []
        try:
            for prompt in prompts:
                slots.append(self.open(prompt.ids, None, prompt.positions))
            return slots, np.stack([self._prefill_whole(slot) for slot in slots])
        except BaseException:
            self.free(slots)
            raise

    @on_graph_thread
    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        slots = list(slots)
        for slot in slots:
            one = self._running[slot]
            if not one.ready:
                raise ValueError(f"slot {slot}: its prompt has not run to the end")
            if one.length >= self.capacity:
                raise ValueError(f"slot {slot} is full: it has room for {self.capacity} tokens")
        for slot in slots:
            self._make_room(self._running[slot])
        logits = self._run_step(slots, tokens)
        logits = logits if slots == list(range(len(logits))) else logits[slots]
        for slot, row in zip(slots, logits):
            one = self._running[slot]
            one.length += 1
            one.position += 1
            self._note(one, row)
        return logits

    @on_graph_thread
    def fork(self, slots: Sequence[int]) -> list[int]:
        if not all(self._running[slot].ready for slot in slots):
            raise ValueError("fork: a prompt has not run to the end")
        targets = self._take_slots(len(slots))
        for target, slot in zip(targets, slots):
            self._running[target] = self._twin(slot)
        return targets

    @on_graph_thread
    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            one = self._running.pop(slot)
            self._release_pages(one)
            self._leave(one)
            self._free.append(int(slot))

    def _prefill_whole(self, slot: int) -> np.ndarray:
        while True:
            logits = self.prefill(slot)
            if logits is not None:
                return logits

    def _take_slots(self, count: int) -> list[int]:
        if count > len(self._free):
            raise NoRoom(f"{count} sequences for {len(self._free)} free slots of {self.slots}")
        self._free.sort()
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _twin(self, slot: int) -> _Running:
        """A copy of a sequence, with the same pages."""
        one = self._running[slot]
        for page in one.pages[: one.count].tolist():
            self._pool.share(page)
        if one.adapter is not None:
            one.adapter.rows += 1
        return replace(one, pages=one.pages.copy())

    def _leave(self, one: _Running) -> None:
        """A sequence ends the use of its adapter."""
        if one.adapter is not None:
            self.graphs.adapters.leave(one.adapter)
            self._drop(one.adapter)

    def _drop(self, adapter: RowAdapter) -> None:
        """Releases the prefix of an adapter that nothing uses any more."""
        if adapter.gone:
            for page in self._prefixes.pop(adapter, []):
                self._pool.release(page)

    def _prefix_of(self, adapter: RowAdapter | None) -> tuple[list[int], int]:
        """Pages before those of the tokens, and the index of the first key there."""
        if adapter is None or adapter.prefix is None:
            return self._prefix, self.graphs.first
        pages = self._prefixes[adapter]
        return pages, len(pages) * PAGE - adapter.prefix.shape[1]

    def _write_prefix(self, adapter: RowAdapter) -> None:
        """Writes the prefix of an adapter, if it has one, to pages of its own. It ends where a page ends."""
        if adapter.prefix is None:
            return
        parts, length = adapter.prefix, adapter.prefix.shape[1]
        pages = [self._pool.take() for _ in range(pages_of(length))]
        content = np.zeros((len(parts), len(pages) * PAGE, *parts.shape[2:]), np.float32)
        content[:, content.shape[1] - length :] = parts
        # The tables are those of all keys, then those of all values.
        content = np.concatenate((content[::2], content[1::2]))
        self._copy()
        for number, page in enumerate(pages):
            self._write_page(page, content[:, number * PAGE : (number + 1) * PAGE])
            self._unclean.discard(page)
        self._prefixes[adapter] = pages

    def _write_page(self, page: int, parts: np.ndarray) -> None:
        """Writes keys and values float32 [tables, PAGE, G, D] to a page."""
        content = np.ascontiguousarray(self.cache.page_content(parts), np.float32)
        number = Tensor(np.array([page], np.int32))
        self.graphs.write_page.compile_and_run(number, Tensor(content, self.cache.keys[0].dtype))

    def _find(self, one: _Running) -> None:
        """Takes pages that others have computed. The last token of a prompt always runs: its logits are needed."""
        chunk = self.graphs.chunk
        while one.length + chunk < len(one.ids):
            pages = self._pool.find(one.keys[one.length // PAGE : (one.length + chunk) // PAGE])
            if not pages:
                return
            one.pages[one.count : one.count + len(pages)] = pages
            one.count += len(pages)
            one.length += chunk
            one.found += chunk

    def _add_page(self, one: _Running) -> None:
        page = self._pool.take()
        if page in self._unclean:
            self._unclean.remove(page)
            self._copies.append((ZEROS, page))
        one.pages[one.count] = page
        one.count += 1

    def _make_room(self, one: _Running) -> None:
        """Gives the next token a page that no other sequence uses."""
        number = (one.start + one.length) // PAGE
        if number == one.count:
            self._add_page(one)
            return
        page = int(one.pages[number])
        if self._pool.is_shared(page):
            one.pages[number] = self._pool.take()
            self._copies.append((page, int(one.pages[number])))
            self._unclean.discard(int(one.pages[number]))
            self._pool.release(page)

    def _release_pages(self, one: _Running, start: int = 0) -> None:
        """Ends the use of all pages from number `start` on; the last ones are forgotten first."""
        for page in one.pages[start : one.count][::-1].tolist():
            self._pool.release(page)
        one.pages[start:] = ZEROS
        one.count = start

    def _note(self, one: _Running, logits: np.ndarray) -> bool:
        """Whether the logits of a sequence are finite; if not, nobody may take its pages as they are."""
        if np.isfinite(logits).all():
            return True
        self.sound = self.graphs.sound = False
        own = one.pages[one.start // PAGE : one.count].tolist()
        self._unclean.update(page for page in own if not self._pool.is_registered(page))
        return False

    def _empty_table(self) -> np.ndarray:
        """Pages of a row without a sequence."""
        pages = np.full(self.graphs.pages_of_slot, ZEROS, np.int32)
        pages[0] = SCRATCH
        return pages

    def _copy(self) -> None:
        """Makes the copies of pages that are due."""
        self.graphs.serve(self)
        while self._copies:
            pairs = np.full((self.slots, 2), SCRATCH)
            due, self._copies = self._copies[: self.slots], self._copies[self.slots :]
            pairs[: len(due)] = due
            run_cell(self.graphs.copy, pairs[:, 0], pairs[:, 1])

    def _run_chunk(
        self, ids: np.ndarray, positions: np.ndarray, indices: np.ndarray, first: int, table: np.ndarray,
        pages: np.ndarray, number: int, last: int
    ) -> tuple[np.ndarray, Tensor]:  # fmt: skip
        """Logits float32 [1, V] after the token at place `last`, and the input of the output layer for all tokens."""
        self._copy()
        rows = self.cache.page_rows(pages, np.where(pages == SCRATCH, 0, indices % PAGE))
        blocks = self.cache.page_blocks(table[None])
        arrays = ids, positions, indices, np.array([first]), rows, blocks, self._numbers([number]), np.array([last])
        logits, states = run_cell(self.graphs.prefill, *arrays)
        return logits.asnumpy(), states

    def _logits_of(self, states: Tensor, place: int, number: int) -> np.ndarray:
        """Logits float32 [1, V] of a token of a chunk, with the adapter of this number."""
        arrays = np.array([place], np.int32), self._numbers([number])
        inputs = [None if array is None else Tensor(array) for array in arrays]
        return self.graphs.output.compile_and_run(states, *inputs).asnumpy()

    def _numbers(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """Numbers of adapters for a graph; None: it has none."""
        return np.array(numbers, np.int32) if self.graphs.bounds.max_adapters else None

    def _run_step(self, slots: list[int], tokens: np.ndarray) -> np.ndarray:
        """Logits float32 [rows, V] after the next token of some slots, in the row of each; other rows are idle."""
        self._copy()
        count = self.graphs.rows
        ids, positions, indices, pages = np.zeros((4, count, 1), np.int32)
        first, numbers = np.zeros(count, np.int32), np.full(count, NO_ADAPTER)
        tables = np.tile(self._empty_table(), (count, 1))
        pages[:] = SCRATCH
        ids[slots, 0] = tokens
        for slot in slots:
            one = self._running[slot]
            index = one.start + one.length
            positions[slot], indices[slot], first[slot] = one.position, index, one.first
            pages[slot], tables[slot], numbers[slot] = one.pages[index // PAGE], one.pages, one.number
        rows = self.cache.page_rows(pages, indices % PAGE)
        blocks = self.cache.page_blocks(tables)
        arrays = ids, positions, indices, first, rows, blocks, self._numbers(numbers)
        return run_cell(self.graphs.step, *arrays).asnumpy()
