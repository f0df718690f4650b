"""Adapters of each sequence of the paged decoder: LoRA of several ranks, P-Tuning prefixes, none, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import slow_unless
from mindspore import nn
from reference import FOLDER, fresh_golden_model, golden_model
from tolerances import LOGITS

from glm_ms.generation.graphs import Logits, run_cell
from glm_ms.generation.kernel_graphs import KernelGraphs
from glm_ms.generation.page_graphs import PageGraphs
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.generation.pages import PAGE
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.cpu import library
from glm_ms.peft.adapter import AdapterError, StoredAdapter, attach, read_adapter
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig, prefix_shapes
from glm_ms.peft.rows import AdapterBounds

SLOTS, CAPACITY, CHUNK = 4, 64, 32
BOUNDS = AdapterBounds(max_adapters=5, max_rank=8, max_prefix=20)
PROMPT = [5, 17, 300, 44, 9, 8, 7, 200, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21]


def lora(rank: int, modules: str, seed: int) -> StoredAdapter:
    """A LoRA adapter of glm2_tiny with random matrices, in all layers whose names contain one of some words."""
    rng, tensors = np.random.default_rng(seed), {}
    linears = golden_model("glm2_tiny").network.linears()
    chosen = [name for name in linears if any(word in name for word in modules.split())]
    for name in chosen:
        shapes = {"A": (rank, linears[name].in_features), "B": (linears[name].out_features, rank)}
        for letter, shape in shapes.items():
            tensors[f"{name}.lora_{letter}.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
    return StoredAdapter(Path(f"lora-{seed}"), LoraConfig(rank, 16.0, 0.0, tuple(chosen)), tensors)


def prefix(length: int, projected: bool, seed: int) -> StoredAdapter:
    """A P-Tuning prefix of glm2_tiny with random values."""
    config, rng = PrefixConfig(length, projected, 24 if projected else None, 0.0), np.random.default_rng(seed)
    shapes = prefix_shapes(golden_model("glm2_tiny").config, config)
    size = 0.3 if projected else 0.7
    tensors = {
        f"transformer.prefix_encoder.{name}": rng.normal(0, size, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return StoredAdapter(Path(f"prefix-{seed}"), config, tensors)


ADAPTERS = {
    "small": lora(2, "query_key_value", 1),
    "large": lora(8, "query_key_value dense output_layer", 2),
    "short": prefix(5, False, 3),
    "long": prefix(20, True, 4),
}
TRAINED = read_adapter(FOLDER.parent / "train" / "lora" / "final")


@cache
def shared(kind: str) -> PageGraphs:
    """Graphs with room for adapters, compiled once."""
    network = fresh_golden_model("glm2_tiny").network
    graphs = made(kind, network, BOUNDS)
    PagedDecoder(graphs).compile()
    return graphs


def made(kind: str, network: GLMNetwork, bounds: AdapterBounds | None = None) -> PageGraphs:
    if kind == "portable":
        return PagedGraphs(network, SLOTS, CAPACITY, CHUNK, bounds)
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    return KernelGraphs(network, SLOTS, CAPACITY, CHUNK, bounds, largest_chunk=CHUNK)


@pytest.fixture(params=["portable", "kernels"])
def decoder(request: pytest.FixtureRequest) -> Iterator[PagedDecoder]:
    """One with all `ADAPTERS`."""
    found = PagedDecoder(shared(request.param))
    for name, stored in ADAPTERS.items():
        found.load_adapter(name, stored)
    yield found
    found.reset()
    for name in found.adapters():
        found.unload_adapter(name)
    assert found.pages_used == 0


def begin(decoder: PagedDecoder, ids: list[int], adapter: str | None) -> tuple[int, np.ndarray]:
    slot, logits = decoder.open(ids, adapter), None
    while logits is None:
        logits = decoder.prefill(slot)
    return slot, logits


def run_alone(decoder: PagedDecoder, ids: list[int], adapter: str | None, count: int = 6) -> np.ndarray:
    """Logits of each token of a greedy answer, float32 [count, V]."""
    slot, logits = begin(decoder, ids, adapter)
    found = [logits]
    while len(found) < count:
        found.append(decoder.step([slot], np.array([found[-1].argmax()], np.int32))[0])
    decoder.free([slot])
    return np.stack(found)


def attached(stored: StoredAdapter, ids: list[int]) -> np.ndarray:
    """Logits float32 [S, V] of the network to which an adapter is attached."""
    network = fresh_golden_model("glm2_tiny").network
    attach(network, stored.config, stored=stored).assign(stored.tensors, stored.path)
    row = np.array([ids])
    return run_cell(Logits(network), row, np.ones_like(row), np.arange(len(ids))[None], np.arange(len(ids))).asnumpy()[
        0
    ]


@pytest.mark.parametrize("name", slow_unless(["large", "long"], [*ADAPTERS, "trained"]))
def test_a_sequence_with_an_adapter_is_that_of_the_network_with_it(decoder: PagedDecoder, name: str) -> None:
    """The tokens of a prompt and those that are generated."""
    if name == "trained":
        decoder.load_adapter(name, TRAINED)
    found, base = run_alone(decoder, PROMPT, name), run_alone(decoder, PROMPT, None)
    expected = attached({**ADAPTERS, "trained": TRAINED}[name], [*PROMPT, *found.argmax(1)[:-1].tolist()])
    np.testing.assert_allclose(found, expected[len(PROMPT) - 1 :], **LOGITS)
    slot = decoder.open(PROMPT, name)
    np.testing.assert_allclose(decoder.prefill(slot, True), expected[: len(PROMPT)], **LOGITS)
    decoder.free([slot])
    print(f"largest difference of a logit: {np.abs(found - expected[len(PROMPT) - 1 :]).max():.2g}")
    assert np.abs(found[0] - base[0]).max() > 0.1


def test_a_sequence_without_an_adapter_is_that_of_a_decoder_without(decoder: PagedDecoder) -> None:
    """To the last bit."""
    kind = "kernels" if decoder.exact_rows else "portable"
    plain = PagedDecoder(made(kind, golden_model("glm2_tiny").network))
    slot, _ = begin(decoder, PROMPT, "large")
    np.testing.assert_array_equal(run_alone(decoder, PROMPT, None), run_alone(plain, PROMPT, None))
    decoder.free([slot])
    assert plain.adapters() == []
    with pytest.raises(AdapterError, match="--max-adapters is 0"):
        plain.load_adapter("small", ADAPTERS["small"])


def test_the_same_bits_alone_and_in_company(decoder: PagedDecoder) -> None:
    """Twelve requests, of all adapters and none, join and leave; some prompts are the same, with other adapters."""
    rng, names = np.random.default_rng(0), [None, *ADAPTERS]
    requests = [
        (PROMPT + rng.integers(3, 400, rng.integers(1, 20)).tolist(), names[number % 5], int(rng.integers(2, 7)))
        for number in range(12)
    ]
    alone = []
    for request in requests:
        decoder.reset()
        alone.append(run_alone(decoder, *request))
    decoder.reset()
    waiting, running, found = list(range(12)), {}, [[] for _ in requests]
    while waiting or running:
        while waiting and len(running) < SLOTS:
            number = waiting.pop(0)
            slot, logits = begin(decoder, *requests[number][:2])
            running[slot] = number
            found[number].append(logits)
        for slot in [slot for slot, number in running.items() if len(found[number]) == requests[number][2]]:
            decoder.free([slot])
            del running[slot]
        slots = list(running)[::-1]
        if slots:
            words = np.array([found[running[slot]][-1].argmax() for slot in slots], np.int32)
            for slot, row in zip(slots, decoder.step(slots, words)):
                found[running[slot]].append(row)
    for one, expected in zip(found, alone):
        np.testing.assert_array_equal(np.stack(one), expected)
    used = sum(-(-stored.config.pre_seq_len // PAGE) for name, stored in ADAPTERS.items() if name in ("short", "long"))
    assert decoder.pages_used == used, "only the pages of prefixes stay in use"


def test_a_page_is_found_only_with_the_same_adapter(decoder: PagedDecoder) -> None:
    for name in ("small", "long", None):
        slots = []
        found = (len(PROMPT) * 2 - 1) // PAGE * PAGE if decoder.exact_rows else CHUNK
        for expected in (0, found):
            slots.append(begin(decoder, PROMPT * 2, name)[0])
            assert decoder.cached(slots[-1]) == expected
        decoder.free(slots)
    decoder.unload_adapter("small")
    decoder.load_adapter("small", lora(2, "query_key_value", 77))
    slot, logits = begin(decoder, PROMPT * 2, "small")
    assert decoder.cached(slot) == 0, "another adapter of the same name"
    np.testing.assert_array_equal(run_alone(decoder, PROMPT * 2, "small")[0], logits)


@pytest.mark.parametrize("name", ["large", "long"])
def test_copies_keep_the_adapter_after_it_is_unloaded(decoder: PagedDecoder, name: str) -> None:
    """Its pages and matrices stay until the last sequence has ended; then they serve another adapter."""
    expected = run_alone(decoder, PROMPT, name, 4)
    slot, logits = begin(decoder, PROMPT, name)
    (copy,) = decoder.fork([slot])
    decoder.unload_adapter(name)
    assert name not in decoder.adapters()
    with pytest.raises(ValueError, match=f"adapter '{name}': not loaded"):
        decoder.open(PROMPT, name)
    decoder.load_adapter("filler", lora(8, "query_key_value", 9))
    with pytest.raises(AdapterError, match="1 unloaded ones still answer"):
        decoder.load_adapter(name, ADAPTERS[name])
    decoder.free([slot])
    (other,) = decoder.fork([copy])
    decoder.free([copy])
    found = [logits]
    while len(found) < 4:
        found.append(decoder.step([other], np.array([found[-1].argmax()], np.int32))[0])
    np.testing.assert_array_equal(np.stack(found), expected)
    used = decoder.pages_used
    decoder.free([other])
    assert decoder.pages_used < used
    decoder.load_adapter(name, ADAPTERS[name])
    np.testing.assert_array_equal(run_alone(decoder, PROMPT, name, 4), expected)


def test_loading_compiles_nothing(decoder: PagedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_cell = [], nn.Cell.compile

    def note(cell: nn.Cell, *inputs: object, **options: object) -> None:
        known = set(cell.compile_cache)
        compile_cell(cell, *inputs, **options)
        compiled.extend(type(cell).__name__ for _ in cell.compile_cache - known)

    monkeypatch.setattr(nn.Cell, "compile", note)
    slot, logits = begin(decoder, PROMPT, None)
    for name in list(ADAPTERS):
        decoder.unload_adapter(name)
    for name, stored in [*ADAPTERS.items(), ("again", ADAPTERS["small"])]:
        decoder.load_adapter(name, stored)
        run_alone(decoder, PROMPT, name)
    found = [logits, decoder.step([slot], np.array([logits.argmax()], np.int32))[0]]
    decoder.free([slot])
    np.testing.assert_array_equal(np.stack(found), run_alone(decoder, PROMPT, None, 2))
    assert compiled == []


def test_what_fits_no_longer(decoder: PagedDecoder) -> None:
    decoder.load_adapter("one more", lora(1, "dense_4h_to_h", 5))
    used = decoder.pages_used
    with pytest.raises(AdapterError, match="no room for another adapter: --max-adapters is 5"):
        decoder.load_adapter("too many", ADAPTERS["small"])
    decoder.unload_adapter("one more")
    with pytest.raises(AdapterError, match="a prefix of 21 positions, the longest one here has 20"):
        decoder.load_adapter("too long", prefix(21, False, 6))
    assert decoder.pages_used == used
    with pytest.raises(ValueError, match="adapter 'smal': not loaded; did you mean small"):
        decoder.open(PROMPT, "smal")


def test_all_slots_fit_beside_the_longest_prefixes(decoder: PagedDecoder) -> None:
    """The pages of the cache are enough for full sequences in every slot, with any adapters."""
    decoder.load_adapter("also long", prefix(20, False, 8))
    ids = np.random.default_rng(1).integers(3, 400, (SLOTS, CAPACITY - 1)).tolist()
    slots = [begin(decoder, one, name)[0] for one, name in zip(ids, ["long", "also long", "short", None])]
    decoder.step(slots, np.full(SLOTS, 7, np.int32))
    with pytest.raises(ValueError, match="is full"):
        decoder.step(slots, np.full(SLOTS, 7, np.int32))
    decoder.free(slots)
