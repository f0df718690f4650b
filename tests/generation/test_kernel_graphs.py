"""The decoder on the C++ kernels: against the portable network, and what only it can do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import CASES, fresh_golden_model, golden_model, golden_numbers
from tolerances import LOGITS

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.generation import graphs
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.kernel_graphs import ROWS, KernelGraphs
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.model.kernels import KernelGLM
from glm_ms.ops.cpu import library

TINY = GLMConfig(
    num_layers=2, padded_vocab_size=96, hidden_size=40, ffn_hidden_size=56, kv_channels=12, num_attention_heads=6,
    multi_query_group_num=2, seq_length=512
)  # fmt: skip


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")


def random_model(seed: int = 0, **changes: object) -> GLMForCausalLM:
    """A network with weights large enough to make every part of it count."""
    model, rng = GLMForCausalLM(dataclasses.replace(TINY, **changes)), np.random.default_rng(seed)
    for name, parameter in model.parameters().items():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values = rng.normal(one, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(values, parameter.dtype))
    return model


def decoder_of(model: GLMForCausalLM, slots: int = 3, capacity: int = 512, **options: object) -> PagedDecoder:
    return PagedDecoder(KernelGraphs(model.network, slots, capacity, **options))


def read(decoder: PagedDecoder, ids: object, all_logits: bool = False) -> tuple[int, np.ndarray]:
    """The slot of a prompt, and the logits of its last token, or of all."""
    slot, found = decoder.open(ids), []
    while not decoder.ready(slot):
        found.append(decoder.prefill(slot, all_logits))
    return slot, np.concatenate(found) if all_logits else found[-1]


def words(count: int, seed: int = 0, vocab: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, count).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> GLMForCausalLM:
    return random_model()


@pytest.fixture
def decoder(model: GLMForCausalLM) -> Iterator[PagedDecoder]:
    found = decoder_of(model)
    yield found
    found.free(list(found._running))
    assert found.pages_used == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"multi_query_attention": False, "kv_channels": 20},
        {"rmsnorm": False, "apply_residual_connection_post_layernorm": True, "add_bias_linear": True},
        {"post_layer_norm": False, "add_qkv_bias": False, "rope_ratio": 50.0},
        {"num_attention_heads": 10, "multi_query_group_num": 1, "kv_channels": 16},
    ],
    ids=["heads", "layer norm", "no final norm", "odd heads"],
)
def test_logits_are_those_of_the_network(changes: dict) -> None:
    model, ids = random_model(1, **changes), words(50)
    decoder = decoder_of(model, chunk=16, largest_chunk=32)
    slot, found = read(decoder, ids[:40], True)
    steps = [decoder.step([slot], ids[i : i + 1]) for i in range(40, 50)]
    expected = model(ids).asnumpy()[0]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(np.concatenate((found, *steps)), expected, **LOGITS)


@pytest.mark.parametrize("case", CASES)
def test_golden_prompts_and_steps(case: str) -> None:
    numbers = golden_numbers(case)
    rows = list(zip(*(numbers[name] for name in ("input_ids", "position_ids", "attention_mask"))))
    decoder = decoder_of(golden_model(case), 2, 32)
    slots, logits = decoder.add([Prompt(ids[:16][mask[:16] == 1], at[:16][mask[:16] == 1]) for ids, at, mask in rows])
    np.testing.assert_allclose(logits, numbers["prefill_logits_last"], **LOGITS)
    steps = [decoder.step(slots, numbers["input_ids"][:, i]) for i in range(16, 24)]
    np.testing.assert_allclose(steps, numbers["incremental_logits"], **LOGITS)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_are_read_in_the_type_they_have(stored: str) -> None:
    half = random_model(2, param_init_type=stored)
    whole, ids = random_model(2), words(20)
    for name, parameter in whole.parameters().items():
        rounded = half.parameters()[name]
        assert rounded.dtype == getattr(ms, stored)
        parameter.set_data(rounded.astype(ms.float32))
    expected = whole(ids).asnumpy()[0]
    np.testing.assert_allclose(read(decoder_of(half), ids, True)[1], expected, **LOGITS)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_quantized_layers(bits: int, group: int | None) -> None:
    """Their inputs are rounded to 16 bits, which the portable layers do not do."""
    model, ids = random_model(3, hidden_size=48), words(40)
    whole = model(ids).asnumpy()[0]
    model.quantize(bits, group)
    expected = model(ids).asnumpy()[0]
    decoder = decoder_of(model)
    slot, found = read(decoder, ids[:30], True)
    steps = [decoder.step([slot], ids[i : i + 1]) for i in range(30, 40)]
    error = np.abs(np.concatenate((found, *steps)) - expected).max()
    print(f"{bits} bits: {error:.2g} of logits up to {np.abs(expected).max():.2g}")
    assert error < 1e-3 * np.abs(expected).max()
    assert np.abs(expected - whole).max() > 10 * error


def test_a_token_has_the_same_bits_in_chunks_of_any_size(model: GLMForCausalLM) -> None:
    ids = words(300)
    _, expected = read(decoder_of(model, largest_chunk=16, chunk=16), ids, True)
    for chunk in (48, ROWS, 2 * ROWS):
        _, found = read(decoder_of(model, largest_chunk=chunk), ids, True)
        assert found.tobytes() == expected.tobytes()
    decoder = decoder_of(model)
    slot, _ = read(decoder, ids[:1])
    steps = [decoder.step([slot], ids[i : i + 1])[0] for i in range(1, 300)]
    assert np.array(steps).tobytes() == expected[1:].tobytes()


def test_a_token_has_the_same_bits_with_any_number_of_threads(model: GLMForCausalLM) -> None:
    kernels, ids = library.load(), words(150)
    before, found = kernels.glm_ms_threads(), []
    try:
        for count in (1, 2, 5):
            kernels.glm_ms_set_threads(count)
            decoder = decoder_of(model)
            slot, logits = read(decoder, ids, True)
            found.append(logits.tobytes() + decoder.step([slot], ids[:1]).tobytes())
    finally:
        kernels.glm_ms_set_threads(before)
    assert len(set(found)) == 1


def test_several_tokens_at_a_time_are_as_many_steps(decoder: PagedDecoder) -> None:
    prompts, tokens = [words(15, 1), words(40, 2)], [words(20, 3), words(3, 4)]
    expected = []
    for ids, some in zip(prompts, tokens):
        slot, _ = read(decoder, ids)
        expected.append(np.concatenate([decoder.step([slot], some[i : i + 1]) for i in range(len(some))]))
        decoder.free([slot])
    decoder.reset()
    slots = [read(decoder, ids)[0] for ids in prompts]
    found = decoder.extend(slots[::-1], [tokens[1].tolist(), tokens[0].tolist()])
    assert [one.tobytes() for one in found] == [expected[1].tobytes(), expected[0].tobytes()]
    following = decoder.step(slots, np.array([5, 6], np.int32))
    alone = decoder.open([*prompts[0], *tokens[0], 5])
    assert decoder.prefill(alone).tobytes() == following[0].tobytes()


def test_dropped_tokens_leave_nothing(decoder: PagedDecoder) -> None:
    ids, right, wrong = words(10, 1), words(30, 2), words(40, 3)
    slot, _ = read(decoder, ids)
    expected = np.concatenate([decoder.step([slot], right[i : i + 1]) for i in range(30)])
    decoder.free([slot])
    decoder.reset()
    slot, _ = read(decoder, ids)
    found = []
    for i in range(0, 30, 3):  # three right ones, then wrong ones that fill pages and are dropped
        found.extend(decoder.extend([slot], [[*right[i : i + 3], *wrong[: 5 + i]]])[0][:3])
        decoder.truncate(slot, 5 + i)
    assert np.array(found).tobytes() == expected.tobytes()
    (twin,) = decoder.fork([slot])
    decoder.truncate(twin, 30)
    assert decoder.step([twin], right[:1]).tobytes() == expected[:1].tobytes(), "back at the end of the prompt"
    assert decoder.step([slot], wrong[:1]).tobytes() != expected[:1].tobytes()
    again = decoder.open([*ids, *right, 7])
    assert decoder.cached(again) == 32
    decoder.free([slot, twin])
    assert decoder.prefill(again).tobytes() == read(decoder_of_same(decoder), [*ids, *right, 7])[1].tobytes()


def decoder_of_same(decoder: PagedDecoder) -> PagedDecoder:
    return PagedDecoder(decoder.graphs)


def test_a_page_that_others_use_is_not_overwritten_after_tokens_were_dropped(decoder: PagedDecoder) -> None:
    slot, _ = read(decoder, words(10, 1))
    decoder.extend([slot], [words(10, 2).tolist()])
    text = [*words(10, 1), *words(10, 2)]
    other = decoder.open([*text, 5])
    assert decoder.cached(other) == 16
    decoder.truncate(slot, 8)
    decoder.extend([slot], [words(8, 3).tolist()])
    assert decoder.prefill(other).tobytes() == read(decoder_of_same(decoder), [*text, 5])[1].tobytes()
    third = decoder.open([*text[:12], *words(8, 3), 5])
    assert decoder.cached(third) == 16, "what was written in its place is found too"
    assert (
        decoder.prefill(third).tobytes() == read(decoder_of_same(decoder), [*text[:12], *words(8, 3), 5])[1].tobytes()
    )


def test_what_cannot_be_extended_or_dropped(decoder: PagedDecoder) -> None:
    slot, _ = read(decoder, words(500))
    with pytest.raises(ValueError, match="slot 0 is full: it has room for 512 tokens"):
        decoder.extend([slot], [[5] * 13])
    with pytest.raises(ValueError, match="slot 0: gets no token"):
        decoder.extend([slot], [[]])
    decoder.extend([slot], [[5, 6]])
    with pytest.raises(ValueError, match="slot 0: has 2 tokens to drop, not 3"):
        decoder.truncate(slot, 3)
    other = PagedDecoder(PagedGraphs(golden_model("glm3_tiny").network, 1, 64))
    assert not other.exact_rows
    with pytest.raises(ValueError, match="rows with equal bits"):
        other.truncate(other.open([5]), 0)


def test_the_pages_of_an_answer_are_found(decoder: PagedDecoder) -> None:
    ids = words(70, 5)
    slot, _ = read(decoder, ids[:20])
    for i in range(20, 60):
        decoder.step([slot], ids[i : i + 1])
    decoder.free([slot])
    slot = decoder.open(ids)
    assert decoder.cached(slot) == 48
    assert decoder.prefill(slot).tobytes() == read(decoder_of_same(decoder), ids)[1].tobytes()


def test_more_slots_than_rows_of_a_run(model: GLMForCausalLM) -> None:
    count = ROWS + 10
    decoder = decoder_of(model, count, 32)
    slots = [read(decoder, [5 + number % 60])[0] for number in range(count)]
    found = decoder.step(slots, np.arange(count, dtype=np.int32) % 90)
    for number in (0, ROWS - 1, ROWS, count - 1):
        single = decoder_of(model, 1, 32)
        slot, _ = read(single, [5 + number % 60])
        assert single.step([slot], np.array([number % 90], np.int32))[0].tobytes() == found[number].tobytes()


def test_decoders_of_all_sizes_share_one_graph(model: GLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, compiled, compile_cell = GraphMaker(model.network), [], KernelGLM.compile

    def note(cell: KernelGLM, *inputs: object, **options: object) -> None:
        compiled.append(set(cell.compile_cache))
        compile_cell(cell, *inputs, **options)
        compiled[-1] = cell.compile_cache - compiled[-1]

    monkeypatch.setattr(KernelGLM, "compile", note)
    PagedDecoder(maker(3, 64)).compile()
    for slots, capacity in ((1, 64), (5, 512), (3, 64)):
        decoder = PagedDecoder(maker(slots, capacity))
        slot, _ = read(decoder, words(capacity - 1))
        decoder.step([slot], np.array([5], np.int32))
    assert [len(new) for new in compiled] == [1], "nobody looks for the graph again"


def test_a_mindspore_that_looks_for_its_graph(model: GLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = read(decoder_of(model), words(20))
    monkeypatch.setattr(graphs, "EXECUTOR", None)
    _, found = read(decoder_of(model), words(20))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("storage", "room"), [("bfloat16", 0.03), ("int8", 0.06)])
def test_smaller_keys_and_values(model: GLMForCausalLM, storage: str, room: float) -> None:
    """The error is that of the rounding; bits do not depend on chunks; a prefix of the network is stored alike."""
    ids = words(100)
    _, exact = read(decoder_of(model), ids, True)
    small = decoder_of(model, storage=storage)
    _, found = read(small, ids, True)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    print(f"{storage}: largest error {error:.2g} of the largest logit")
    assert 1e-5 < error < room
    _, chunked = read(decoder_of(model, storage=storage, largest_chunk=16, chunk=16), ids, True)
    assert chunked.tobytes() == found.tobytes()
    assert small.memory.bytes.nbytes < 0.8 * decoder_of(model).graphs.serve(decoder_of(model)).bytes.nbytes


def test_a_long_prompt_needs_no_memory_but_its_pages() -> None:
    """The scores of the whole prompt would be 32 x 2000 x 2000 x 4 bytes, 512 MB."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the peak of the memory is measured by /proc")
    model = random_model(4, num_layers=4, num_attention_heads=32, seq_length=2048)
    decoder = decoder_of(model, 1, 2048)
    decoder.compile()

    def memory(kind: str) -> int:
        return int(re.search(rf"{kind}:\s*(\d+) kB", status.read_text())[1]) << 10

    reset.write_text("5")
    before = memory("VmRSS")
    read(decoder, words(2000))
    grown = memory("VmHWM") - before
    assert decoder.memory.bytes.ctypes.data % 64 == 0
    print(f"{grown / 2**20:.1f} MiB for 2000 tokens; pages: {decoder.memory.bytes.nbytes / 2**20:.1f} MiB")
    assert grown < decoder.memory.bytes.nbytes + (32 << 20)


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ([5, 96], [0, 1], "token 96: the vocabulary has ids 0 to 95"),
        ([-1, 5], [0, 1], "token -1: the vocabulary has ids 0 to 95"),
        ([5, 6], [511, 512], r"position 512: the network has positions 0 to 511 \(config.seq_length\)"),
        ([5, 6], [-1, 0], r"position -1: the network has positions 0 to 511 \(config.seq_length\)"),
    ],
)
def test_ids_and_positions_that_the_network_has_not(
    decoder: PagedDecoder, ids: list[int], positions: list[int], message: str
) -> None:
    slot = decoder.open(ids, positions=np.array(positions))
    with pytest.raises(ValueError, match=message):
        decoder.prefill(slot)
    decoder.free([slot])


def test_why_a_network_runs_its_portable_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fresh_golden_model("glm3_tiny").network
    assert GraphMaker(network).why_portable is None
    assert isinstance(GraphMaker(network)(1, 64), KernelGraphs)
    with monkeypatch.context() as changed:
        changed.setenv("GLM_MS_CPU_KERNELS", "0")
        assert GraphMaker(network).why_portable == "GLM_MS_CPU_KERNELS=0"
        assert isinstance(GraphMaker(network)(1, 64), PagedGraphs)
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "reason", lambda: "no library")
    assert GraphMaker(network).why_portable == "no library"


@pytest.mark.parametrize("place", ["input_layernorm", "mlp", "self_attention.dense"])
def test_cells_of_other_classes_run_as_they_are(place: str) -> None:
    network = random_model().network
    cell = attrgetter(place)(network.transformer.encoder.layers[1])
    cell.__class__ = type("Own", (type(cell),), {})
    assert GraphMaker(network).why_portable == "the network has a cell of the class Own, which no kernel computes"
