"""The paged decoder: the same bits in any company, pages that are found again, nothing compiles, no page leaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import Tensor, nn
from reference import FOLDER, fresh_golden_model, golden_model, golden_numbers
from tolerances import LOGITS

from glm_ms.generation.inputs import Prompt
from glm_ms.generation.kernel_graphs import KernelGraphs
from glm_ms.generation.page_graphs import PageGraphs
from glm_ms.generation.paged import NoRoom, PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.generation.pages import PAGE
from glm_ms.ops.cpu import library

SLOTS, CAPACITY, CHUNK = 3, 64, 32
BROKEN = 500  # an id whose embedding is NaN in `broken_graphs`


KINDS = ["portable", "kernels"]
kind = KINDS[0]


@pytest.fixture(params=KINDS, autouse=True)
def each_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs over the portable graphs, and over those of the C++ kernels."""
    if request.param == "kernels" and library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    monkeypatch.setitem(globals(), "kind", request.param)
    return request.param


@cache
def graphs_of(kind: str, case: str, slots: int) -> PageGraphs:
    """Shared by the tests: compiling takes longer than they do."""
    if case == "prefix":
        model = fresh_golden_model("glm2_tiny")
        model.load_adapter(FOLDER.parent / "train" / "ptuning_v2" / "final.safetensors")
    else:
        model = golden_model(case)
    if kind == "kernels":
        made: PageGraphs = KernelGraphs(model.network, slots, CAPACITY, CHUNK, largest_chunk=CHUNK)
    else:
        made = PagedGraphs(model.network, slots, CAPACITY, CHUNK)
    PagedDecoder(made).compile()
    return made


def graphs(case: str, slots: int = SLOTS) -> PageGraphs:
    return graphs_of(kind, case, slots)


@pytest.fixture
def decoder(each_kind: str) -> PagedDecoder:
    return PagedDecoder(graphs("glm3_tiny"))


@pytest.fixture
def broken_graphs(each_kind: str) -> Iterator[PageGraphs]:
    """Graphs whose network gives NaN after one id."""
    own = graphs("glm3_tiny")
    table = own.network.transformer.embedding.embedding_table
    sound = table.asnumpy().copy()
    values = sound.copy()
    values[BROKEN] = np.nan
    table.set_data(Tensor(values))
    yield own
    table.set_data(Tensor(sound))


def has_nan(decoder: PagedDecoder) -> bool:
    """Whether a key or value in its memory is NaN."""
    if kind == "kernels":
        return bool(np.isnan(decoder.memory.bytes.view(np.float32)).any())
    return any(np.isnan(table.asnumpy()).any() for table in decoder.memory)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that a test compiles."""
    compiled: list[str] = []
    compile_cell = nn.Cell.compile

    def note(cell: nn.Cell, *inputs: object, **options: object) -> None:
        known = set(cell.compile_cache)
        compile_cell(cell, *inputs, **options)
        compiled.extend(type(cell).__name__ for _ in cell.compile_cache - known)

    monkeypatch.setattr(nn.Cell, "compile", note)
    return compiled


@dataclass
class Request:
    """A prompt, the tokens it gets, and the logits they were chosen from."""

    ids: list[int]
    count: int
    logits: list[np.ndarray] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [int(one.argmax()) for one in self.logits]


def random_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of all lengths; two of three begin with one of two system prompts."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(3, 400, size).tolist() for size in (37, 33)]
    requests = []
    for number in range(count):
        system = systems[number % 3] if number % 3 < 2 else []
        own = rng.integers(3, 400, rng.integers(1, 52 - len(system))).tolist()
        requests.append(Request(system + own, int(rng.integers(1, 12))))
    return requests


def run_alone(decoder: PagedDecoder, request: Request) -> Request:
    found = Request(request.ids, request.count)
    slots, logits = decoder.add([Prompt(np.array(request.ids, np.int32), np.arange(len(request.ids), dtype=np.int32))])
    found.logits.append(logits[0])
    while len(found.logits) < found.count:
        found.logits.append(decoder.step(slots, np.array(found.tokens[-1:], np.int32))[0])
    decoder.free(slots)
    return found


def run_together(decoder: PagedDecoder, requests: list[Request]) -> int:
    """Runs all in the slots there are: at most one chunk of a prompt between steps. Returns the tokens found."""
    waiting, reading, running = list(requests), {}, {}
    found = 0
    while waiting or reading or running:
        while waiting and len(reading) + len(running) < decoder.slots:
            request = waiting.pop(0)
            reading[decoder.open(request.ids)] = request
        if reading:
            slot, request = next(iter(reading.items()))
            logits = decoder.prefill(slot)
            if logits is not None:
                request.logits.append(logits)
                found += decoder.cached(slot)
                running[slot] = reading.pop(slot)
        ended = [slot for slot, request in running.items() if len(request.logits) == request.count]
        decoder.free(ended)
        for slot in ended:
            del running[slot]
        if running:
            slots = list(running)[::-1]  # in any order
            tokens = np.array([running[slot].tokens[-1] for slot in slots], np.int32)
            for slot, row in zip(slots, decoder.step(slots, tokens)):
                running[slot].logits.append(row)
    return found


def same_bits(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return np.array(found).tobytes() == np.array(expected).tobytes()


@pytest.mark.parametrize("case", slow_unless(["glm3_tiny"], ["glm3_tiny", "glm2_mha", "prefix", "glm3_tiny, 8 slots"]))
def test_requests_get_the_same_bits_alone_and_in_company(case: str, compilations: list[str]) -> None:
    name, _, slots = case.partition(", ")
    own, requests = graphs(name, 8) if slots else graphs(name), random_requests(24)
    compilations.clear()
    alone = []
    for request in requests:
        single = PagedDecoder(own)
        alone.append(run_alone(single, request))
        assert single.pages_used == own.prefix_pages
    decoder = PagedDecoder(own)
    for again in range(2):  # the second time most pages of prompts are there
        for request in requests:
            request.logits.clear()
        found = run_together(decoder, requests)
        assert found > (200, 500)[again]
        for request, expected in zip(requests, alone):
            assert request.tokens == expected.tokens
            assert same_bits(request.logits, expected.logits)
        assert decoder.pages_used == own.prefix_pages
    assert compilations == []


@pytest.mark.parametrize("case", slow_unless(["glm3_tiny"], ["glm3_tiny", "prefix"]))
def test_logits_are_those_of_the_network(case: str) -> None:
    """The reference for the prefix is the network with its prefix, without a cache."""
    own = graphs(case)
    decoder, ids = PagedDecoder(own), np.random.default_rng(3).integers(3, 500, 45)
    whole = network_logits(case, ids)
    slot = decoder.open(ids[:40])
    assert decoder.prefill(slot) is None
    found = [decoder.prefill(slot)]
    for token in ids[40:]:
        found.append(decoder.step([slot], np.array([token], np.int32))[0])
    np.testing.assert_allclose(np.array(found), whole[39:], **LOGITS)


def network_logits(case: str, ids: np.ndarray) -> np.ndarray:
    """float32 [S, V], without a cache."""
    if case == "prefix":
        model = fresh_golden_model("glm2_tiny")
        model.load_adapter(FOLDER.parent / "train" / "ptuning_v2" / "final.safetensors")
    else:
        model = golden_model(case)
    return model(ids).asnumpy()[0]


def test_golden_prefill_and_steps() -> None:
    numbers = golden_numbers("glm3_tiny")
    decoder = PagedDecoder(graphs("glm3_tiny"))
    rows = list(zip(*(numbers[name] for name in ("input_ids", "position_ids", "attention_mask"))))
    prompts = [Prompt(ids[:16][mask[:16] == 1], at[:16][mask[:16] == 1]) for ids, at, mask in rows]
    slots, logits = decoder.add(prompts)
    np.testing.assert_allclose(logits, numbers["prefill_logits_last"], **LOGITS)
    for i in range(16, 24):
        logits = decoder.step(slots, numbers["input_ids"][:, i])
        np.testing.assert_allclose(logits, numbers["incremental_logits"][i - 16], **LOGITS)


def test_pages_that_a_running_prompt_writes_are_found_at_once(decoder: PagedDecoder) -> None:
    ids = list(range(3, 67))
    first, second = decoder.open(ids), decoder.open([*ids[:40], 400])
    assert decoder.prefill(first) is None
    assert decoder.prefill(second) is not None
    assert decoder.cached(second) == 32, "found after the slot was opened"
    assert decoder.prefill(first) is not None
    decoder.free([first, second])
    found = 48 if decoder.exact_rows else 32
    assert decoder.cached(decoder.open(ids)) == found, "what has the last token runs, whatever is there"


def test_pages_of_other_positions_are_others(decoder: PagedDecoder) -> None:
    ids = list(range(3, 40))
    run_alone(decoder, Request(ids, 1))
    assert decoder.cached(decoder.open(ids)) == 32
    assert decoder.cached(decoder.open(ids, positions=np.arange(2, 39))) == 0


def test_forks_share_pages_until_they_write(decoder: PagedDecoder) -> None:
    ids = list(range(3, 25))
    alone = {word: run_alone_words(ids, [word, word + 1]) for word in (7, 8, 9)}
    slot = decoder.open(ids)
    decoder.prefill(slot)
    pages = decoder.pages_used
    slots = [slot, *decoder.fork([slot, slot])]
    assert decoder.pages_used == pages
    found = [decoder.step(slots, np.array([7, 8, 9], np.int32))]
    assert decoder.pages_used == pages + 2
    found.append(decoder.step(slots, np.array([8, 9, 10], np.int32)))
    for row, word in enumerate((7, 8, 9)):
        assert same_bits([one[row] for one in found], alone[word])
    with pytest.raises(NoRoom, match="1 sequences for 0 free slots of 3"):
        decoder.fork([slot])
    decoder.free(slots)
    assert decoder.pages_used == 0


def run_alone_words(ids: list[int], words: list[int]) -> list[np.ndarray]:
    """Logits after each of some words that follow a prompt."""
    decoder = PagedDecoder(graphs("glm3_tiny"))
    slot = decoder.open(ids)
    decoder.prefill(slot)
    return [decoder.step([slot], np.array([word], np.int32))[0] for word in words]


def test_logits_of_a_whole_prompt(decoder: PagedDecoder, compilations: list[str]) -> None:
    ids = np.arange(3, 43)
    expected = run_alone(decoder, Request(ids.tolist(), 1)).logits[0]
    slot, chunks = decoder.open(ids), []
    assert decoder.cached(slot) == 32
    while not decoder.ready(slot):
        chunks.append(decoder.prefill(slot, True))
    assert decoder.cached(slot) == 0
    assert [len(chunk) for chunk in chunks] == [32, 8]
    found = np.concatenate(chunks)
    assert same_bits([found[-1]], [expected])
    np.testing.assert_allclose(found, golden_model("glm3_tiny")(ids).asnumpy()[0], **LOGITS)
    assert compilations in ([], ["Logits"])  # of the reference
    decoder.free([slot])
    assert decoder.pages_used == 0


def test_a_sequence_of_nan_reaches_no_other_one(broken_graphs: PageGraphs) -> None:
    """Neither beside it, nor in the pages that it leaves."""
    requests = [Request([5, 6, 7], 3), *random_requests(5, seed=5)]
    alone = [run_alone(PagedDecoder(broken_graphs), request) for request in requests]
    decoder = PagedDecoder(broken_graphs)
    slot = decoder.open([*range(3, 43), BROKEN, *range(50, 60)])
    while (logits := decoder.prefill(slot)) is None:
        pass
    assert np.isnan(logits).any()
    broken = [slot]

    def disturb() -> None:
        decoder.step(broken, np.array([5], np.int32))

    first = decoder.open(requests[0].ids)
    while (logits := decoder.prefill(first)) is None:
        disturb()
    disturb()
    assert same_bits([logits], alone[0].logits[:1])
    decoder.free([first, slot])  # the page that is released last, half full of NaN, is taken first
    assert has_nan(decoder)
    run_together(decoder, requests)
    for request, expected in zip(requests, alone):
        assert same_bits(request.logits, expected.logits)


def test_a_new_decoder_takes_no_memory_with_nan(broken_graphs: PageGraphs) -> None:
    first = PagedDecoder(broken_graphs)
    slot = first.open([BROKEN] * 5)
    first.prefill(slot)
    del first
    second = PagedDecoder(broken_graphs)
    run_alone(second, Request([5], 1))
    assert not has_nan(second)


def test_a_prompt_that_is_cancelled_leaves_no_page(decoder: PagedDecoder) -> None:
    slot = decoder.open(list(range(3, 63)))
    decoder.prefill(slot)
    assert decoder.pages_used == 2
    decoder.free([slot])
    assert decoder.pages_used == 0
    assert decoder.cached(decoder.open(list(range(3, 63)))) == 32, "what it has computed is of use to others"


def test_memory_is_enough_for_full_slots(decoder: PagedDecoder) -> None:
    assert decoder.pages_total == SLOTS * CAPACITY // PAGE
    rng = np.random.default_rng(0)
    for _ in range(2):  # the second time every page has a content that could be found
        slots, _ = decoder.add([Prompt(rng.integers(3, 400, 63).astype(np.int32), np.arange(63)) for _ in range(SLOTS)])
        decoder.step(slots, np.array([5, 6, 7], np.int32))
        assert decoder.pages_used == decoder.pages_total
        with pytest.raises(ValueError, match="slot 0 is full: it has room for 64 tokens"):
            decoder.step(slots, np.array([5, 6, 7], np.int32))
        decoder.free(slots)


def test_what_does_not_fit(decoder: PagedDecoder) -> None:
    with pytest.raises(ValueError, match="chunk = 24: must be a multiple of 16"):
        PagedGraphs(golden_model("glm3_tiny").network, SLOTS, CAPACITY, 24)
    with pytest.raises(ValueError, match="a prompt of 65 tokens: a slot has room for 1 to 64"):
        decoder.open([5] * 65)
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        decoder.open([])
    with pytest.raises(ValueError, match="adapter 'other': not loaded"):
        decoder.open([5], "other")
    slots = [decoder.open([5] * 40) for _ in range(SLOTS)]
    with pytest.raises(NoRoom, match="1 sequences for 0 free slots of 3"):
        decoder.open([5])
    with pytest.raises(ValueError, match="slot 0: its prompt has not run to the end"):
        decoder.step([0], np.array([5], np.int32))
    decoder.prefill(slots[0])
    decoder.prefill(slots[0])
    with pytest.raises(ValueError, match="slot 0: its whole prompt has run"):
        decoder.prefill(slots[0])
    decoder.free(slots)


def test_decoders_of_a_size_share_graphs_and_nothing_else(compilations: list[str]) -> None:
    own, requests = graphs("glm3_tiny"), random_requests(3, seed=1)
    alone = [run_alone(PagedDecoder(own), request) for request in requests]
    compilations.clear()
    decoders = [PagedDecoder(own) for _ in requests]
    slots = [decoder.add([Prompt(np.array(request.ids, np.int32), np.arange(len(request.ids)))])[0]
             for decoder, request in zip(decoders, requests)]  # fmt: skip
    for step in range(1, max(request.count for request in requests)):
        for decoder, own_slots, expected in zip(decoders, slots, alone):
            if step < expected.count:
                found = decoder.step(own_slots, np.array([expected.tokens[step - 1]], np.int32))
                assert same_bits([found[0]], [expected.logits[step]])
    assert compilations == []


def test_runs_in_pynative_programs() -> None:
    expected, mode = run_alone_words([5, 6, 7], [8]), ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        assert same_bits(run_alone_words([5, 6, 7], [8]), expected)
    finally:
        ms.set_context(mode=mode)


def test_rows_of_a_step_that_differ_are_told(decoder: PagedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder.exact_rows:
        assert not hasattr(decoder.graphs, "_run_step"), "its rows never differ"
        return
    monkeypatch.setattr(decoder.graphs, "_run_step", lambda *_: np.array([[1.0], [1.0], [1.5]], np.float32))
    with pytest.warns(UserWarning, match="a step of 3 rows gives the same token other digits in other rows"):
        decoder.compile()
