"""The slot decoder over pages: sequences that join and leave, prompts in chunks, pages that sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glm_ms.generation.decoder import Decoder
from glm_ms.generation.graphs import on_graph_thread
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.page_graphs import PageGraphs, pages_of
from glm_ms.generation.pages import PAGE, ZEROS, NoRoom, PagePool, page_keys
from glm_ms.ops.cpu.rows import Span
from glm_ms.peft.adapter import StoredAdapter
from glm_ms.peft.rows import NO_ADAPTER, RowAdapter

__all__ = ["NoRoom", "PagedDecoder"]


@dataclass
class _Running:
    """A sequence in a slot. Its tokens have the indices from `start` on."""

    prompt: int  # S, tokens of the prompt
    ids: np.ndarray  # int32 [capacity], the tokens, those of the prompt first
    positions: np.ndarray  # int32 [capacity]
    first: int  # index of the first key that its tokens see
    start: int
    pages: np.ndarray  # int32 [pages of a slot], the pages of all indices; ZEROS from `count` on
    count: int
    keys: list[bytes]  # of full pages, those of the prompt at least
    root: bytes  # of the key of its first page
    adapter: RowAdapter | None
    length: int = 0  # tokens whose keys and values are there
    found: int = 0  # of these, tokens of pages that others have computed

    @property
    def ready(self) -> bool:
        """Whether the whole prompt has run."""
        return self.length >= self.prompt

    @property
    def number(self) -> int:
        """Number of its adapter in the tables of `RowUpdate`."""
        return NO_ADAPTER if self.adapter is None else self.adapter.number

    def span(self, count: int, logits: int) -> Span:
        """The next tokens, of which the last ones get logits."""
        end = self.length + count
        ids, positions = self.ids[self.length : end], self.positions[self.length : end]
        return Span(ids, positions, self.start + self.length, self.first, self.pages, self.number, logits)

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Adds tokens behind those that have run, at the positions that follow."""
        end = self.length + len(tokens)
        self.ids[self.length : end] = tokens
        self.positions[self.length : end] = self.positions[self.length - 1] + 1 + np.arange(len(tokens))

    def key(self, number: int) -> bytes:
        """The key of page `number` of its tokens, which must be full."""
        while len(self.keys) <= number:
            begin = len(self.keys) * PAGE
            root = self.keys[-1] if self.keys else self.root
            self.keys.extend(page_keys(root, self.ids[begin : begin + PAGE], self.positions[begin : begin + PAGE]))
        return self.keys[number]


class PagedDecoder(Decoder):
    """Sequences over shared pages of one cache.

    A prompt runs in chunks, between which other sequences can step: `open`, then `prefill` until it returns logits.
    The pages of prompts are found again by their tokens, by those before them and by the adapter, for as long as no
    other sequence needs the memory.

    A sequence gets the same bits whatever the other slots do and whatever pages were found; `graphs` say what that
    needs. Where `exact_rows`, the pages of answers are found too.

    While a decoder is in use the weights must not change; `reset` makes it forget everything.

    Attributes:
        slots: sequences at a time.
        capacity: most tokens of a sequence, prompt and new tokens.
        exact_rows: whether `extend` and `truncate` work, see `PageGraphs`.
        pages_total, pages_used: pages of the cache, and those that sequences use now.
    """

    def __init__(self, graphs: PageGraphs) -> None:
        self.graphs, self.exact_rows = graphs, graphs.exact_rows
        self.slots, self.capacity, self.vocab_size = graphs.slots, graphs.capacity, graphs.vocab_size
        self.memory: Any = None  # of its pages, as the graphs keep it
        self.sound = True  # no logit was NaN or infinite
        self._running: dict[int, _Running] = {}
        self._prefixes: dict[RowAdapter, list[int]] = {}  # pages of the prefixes of adapters
        self.reset()

    @on_graph_thread
    def reset(self) -> None:
        """Frees every slot and forgets all pages, also those of a prefix."""
        self.memory = None
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
        self.graphs.compile(self)

    @on_graph_thread
    def serve(self) -> None:
        """Takes the graphs, with its memory; the copies of pages that are due have been made then."""
        self.memory = self.graphs.serve(self)
        copies, self._copies = self._copies, []
        if copies:
            self.graphs.copy(copies)

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
        count = len(ids)
        if not 1 <= count <= self.capacity:
            raise ValueError(f"a prompt of {count} tokens: a slot has room for 1 to {self.capacity}")
        slot = self._take_slots(1)[0]
        tokens, places = np.zeros((2, self.capacity), np.int32)
        tokens[:count], places[:count] = ids, np.arange(count) if positions is None else positions
        prefix, first = self._prefix_of(loaded)
        pages = np.full(self.graphs.pages_of_slot, ZEROS, np.int32)
        pages[: len(prefix)] = prefix
        for page in prefix:
            self._pool.share(page)
        root = b"" if loaded is None else b"%d" % loaded.serial
        keys = list(page_keys(root, tokens[:count], places[:count]))
        start = len(prefix) * PAGE
        one = _Running(count, tokens, places, first, start, pages, len(prefix), keys, root, loaded)
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
        alone = not any(other.ready for other in self._running.values())
        begin, end = one.length, self._chunk_end(one, alone)
        while one.count * PAGE < one.start + end:
            self._add_page(one)
        wanted = end - begin if all_logits else int(end == one.prompt)
        self.serve()
        logits, finite = self.graphs.read(one.span(end - begin, wanted))
        self._advance(one, end - begin, finite)
        if all_logits:
            return logits
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
            self._check_steps(slot, 1)
        for slot, token in zip(slots, tokens):
            self._make_room(self._running[slot], 1)
            self._running[slot].append([token])
        self.serve()
        logits, finite = self.graphs.step(slots, [self._running[slot].span(1, 1) for slot in slots])
        for slot, sound in zip(slots, finite):
            self._advance(self._running[slot], 1, sound, found=self.exact_rows)
        return logits

    @on_graph_thread
    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Appends one or more tokens to each of some slots, in one run; only with `exact_rows`.

        Args:
            slots: distinct slots in use.
            tokens: of each slot.

        Returns:
            For each slot the logits after each of its tokens, float32 [n, V]: the bits of as many steps.

        Raises:
            ValueError: there are no exact rows, a slot gets no token or has no room, or its prompt has not run.
        """
        for slot, some in zip(slots, tokens):
            self._check_steps(slot, len(some))
        for slot, some in zip(slots, tokens):
            self._make_room(self._running[slot], len(some))
            self._running[slot].append(some)
        self.serve()
        logits, finite = self.graphs.extend(
            [self._running[slot].span(len(some), len(some)) for slot, some in zip(slots, tokens)]
        )
        for slot, some, sound in zip(slots, tokens, finite):
            self._advance(self._running[slot], len(some), sound, found=True)
        return np.split(logits, np.cumsum([len(some) for some in tokens])[:-1])

    @on_graph_thread
    def truncate(self, slot: int, count: int) -> None:
        """Drops the last tokens of a slot, of those behind its prompt.

        Raises:
            ValueError: there are no exact rows, or fewer such tokens.
        """
        one = self._running[slot]
        if not self.exact_rows:
            raise ValueError("truncate needs rows with equal bits (the C++ kernels)")
        if not 0 <= count <= one.length - one.prompt:
            raise ValueError(f"slot {slot}: has {max(0, one.length - one.prompt)} tokens to drop, not {count}")
        one.length -= count
        del one.keys[max(one.prompt, one.length) // PAGE :]
        self._release_pages(one, pages_of(one.start + one.length))

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

    def _check_steps(self, slot: int, count: int) -> None:
        """Raises ValueError if a slot cannot take so many tokens."""
        one = self._running[slot]
        if not one.ready:
            raise ValueError(f"slot {slot}: its prompt has not run to the end")
        if one.length + count > self.capacity:
            raise ValueError(f"slot {slot} is full: it has room for {self.capacity} tokens")
        if count < 1:
            raise ValueError(f"slot {slot}: gets no token")

    def _chunk_end(self, one: _Running, alone: bool) -> int:
        """Up to which token the next chunk of a prompt runs; `alone`: no other sequence waits for a step meanwhile."""
        size = self.graphs.largest_chunk if alone else self.graphs.chunk
        return min(one.length + size, one.prompt)

    def _advance(self, one: _Running, count: int, finite: bool, found: bool = True) -> None:
        """Counts tokens that have run. Pages that they have filled are found by others, if `found`."""
        begin, one.length = one.length, one.length + count
        if not finite:
            self.sound = self.graphs.sound = False
            own = one.pages[one.start // PAGE : one.count].tolist()
            self._unclean.update(page for page in own if not self._pool.is_registered(page))
        elif found:
            for number in range(begin // PAGE, one.length // PAGE):
                self._pool.register(int(one.pages[one.start // PAGE + number]), one.key(number))

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
        copies = {name: getattr(one, name).copy() for name in ("ids", "positions", "pages", "keys")}
        return replace(one, **copies)

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
        self.serve()
        for number, page in enumerate(pages):
            places = slice(number * PAGE, (number + 1) * PAGE)
            self.graphs.write(page, content[::2, places], content[1::2, places])
            self._unclean.discard(page)
        self._prefixes[adapter] = pages

    def _find(self, one: _Running) -> None:
        """Takes pages that others have computed. The last token of a prompt always runs: its logits are needed."""
        size = self.graphs.found_in
        while one.length % size == 0 and one.length + size < one.prompt:
            pages = self._pool.find(one.keys[one.length // PAGE : (one.length + size) // PAGE])
            if not pages:
                return
            one.pages[one.count : one.count + len(pages)] = pages
            one.count += len(pages)
            one.length += size
            one.found += size

    def _add_page(self, one: _Running) -> None:
        page = self._pool.take()
        if page in self._unclean:
            self._unclean.remove(page)
            self._copies.append((ZEROS, page))
        one.pages[one.count] = page
        one.count += 1

    def _make_room(self, one: _Running, count: int) -> None:
        """Gives the next tokens pages that no other sequence uses or finds."""
        begin = one.start + one.length
        if begin % PAGE:
            self._own_page(one, begin // PAGE)
        while one.count * PAGE < begin + count:
            self._add_page(one)

    def _own_page(self, one: _Running, number: int) -> None:
        page = int(one.pages[number])
        if self._pool.is_shared(page):
            one.pages[number] = self._pool.take()
            self._copies.append((page, int(one.pages[number])))
            self._unclean.discard(int(one.pages[number]))
            self._pool.release(page)
        elif self._pool.is_registered(page):  # it was full, and tokens were dropped
            self._pool.forget(page)

    def _release_pages(self, one: _Running, start: int = 0) -> None:
        """Ends the use of all pages from number `start` on; the last ones are forgotten first."""
        for page in one.pages[start : one.count][::-1].tolist():
            self._pool.release(page)
        one.pages[start:] = ZEROS
        one.count = start
