"""Slots over the real network: sequences that join and leave, sizes, threads, the pool."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import nn
from reference import FOLDER, fresh_golden_model, golden_model
from tolerances import LOGITS

from glm_ms.generation import GenerationConfig
from glm_ms.generation.decoder import CachedDecoder, DecoderPool, cache_capacity, slot_count
from glm_ms.generation.graphs import GraphThread
from glm_ms.generation.inputs import Prompt, prepare_prompts

# A prompt, the step it joins at, and how many tokens it gets.
REQUESTS = [([5, 17, 300, 8], 0, 9), ([44, 3], 2, 4), ([101, 102, 103, 104, 105, 106, 107], 4, 6)]


def prompt_of(ids: list[int]) -> Prompt:
    return prepare_prompts(ids, vocab_size=512)[0]


def greedy_alone(decoder: CachedDecoder, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits float32 [count, V] they were chosen from."""
    slots, logits = decoder.add([prompt_of(ids)])
    found = [logits]
    while len(found) < count:
        found.append(decoder.step(slots, found[-1].argmax(axis=1).astype(np.int32)))
    decoder.free(slots)
    return [int(one.argmax()) for one in found], np.concatenate(found)


@cache
def decoder_pool(case: str) -> DecoderPool:
    """Shared by the tests: each size has graphs to compile."""
    if case == "prefix":
        model = fresh_golden_model("glm2_tiny")
        model.load_adapter(FOLDER.parent / "train" / "ptuning_v2" / "final.safetensors")
    else:
        model = golden_model(case)
    return DecoderPool(model.network)


@pytest.fixture
def pair() -> CachedDecoder:
    return decoder_pool("glm3_tiny").decoder(2, 64)


@pytest.mark.parametrize("case", slow_unless(["glm3_tiny"], ["glm3_tiny", "glm2_mha", "prefix"]))
def test_requests_that_join_and_leave_get_what_they_get_alone(case: str) -> None:
    pool = decoder_pool(case)
    alone = [greedy_alone(pool.decoder(1, 64), ids, count) for ids, _, count in REQUESTS]
    decoder = pool.decoder(2, 64)  # the third request takes the slot that the second leaves
    running: dict[int, int] = {}  # slot -> request
    tokens: list[list[int]] = [[] for _ in REQUESTS]
    logits: list[list[np.ndarray]] = [[] for _ in REQUESTS]

    def note(slots: list[int], found: np.ndarray) -> None:
        for slot, row in zip(slots, found):
            request = running[slot]
            logits[request].append(row)
            tokens[request].append(int(row.argmax()))

    step = 0
    while step == 0 or running:
        stepped = list(running)[::-1]  # in any order
        if stepped:
            last = np.array([tokens[running[slot]][-1] for slot in stepped], np.int32)
            note(stepped, decoder.step(stepped, last))
        for slot, request in list(running.items()):
            if len(tokens[request]) == REQUESTS[request][2]:
                decoder.free([slot])
                del running[slot]
        for request, (ids, start, _) in enumerate(REQUESTS):
            if step >= start and not tokens[request] and len(running) < decoder.slots:
                slots, found = decoder.add([prompt_of(ids)])
                running[slots[0]] = request
                note(slots, found)
        step += 1
    for request, (expected, expected_logits) in enumerate(alone):
        assert tokens[request] == expected
        np.testing.assert_allclose(np.array(logits[request]), expected_logits, **LOGITS)
        print(f"largest difference of a logit: {np.abs(np.array(logits[request]) - expected_logits).max():.2g}")


def test_slots_that_are_not_stepped_do_not_change(pair: CachedDecoder) -> None:
    expected, _ = greedy_alone(pair, [5, 6, 7], 5)
    slots, logits = pair.add([prompt_of([5, 6, 7]), prompt_of([9, 10])])
    tokens = [int(logits[0].argmax())]
    while len(tokens) < 5:
        for token in (400, 401):
            pair.step(slots[1:], np.array([token], np.int32))
        tokens.append(int(pair.step(slots[:1], np.array(tokens[-1:], np.int32)).argmax()))
    assert tokens == expected


def test_forks_continue_their_source(pair: CachedDecoder) -> None:
    (source,), _ = pair.add([prompt_of([5, 17, 300])])
    slots = [source, *pair.fork([source])]
    assert len(set(slots)) == 2
    words = np.array([7, 8], np.int32)
    found = pair.step(slots, words)
    with pytest.raises(ValueError, match="1 sequences for 0 free slots of 2"):
        pair.fork([source])
    pair.free(slots)
    slots, _ = pair.add([prompt_of([5, 17, 300])] * 2)
    np.testing.assert_allclose(found, pair.step(slots, words), **LOGITS)


def test_what_does_not_fit(pair: CachedDecoder) -> None:
    with pytest.raises(ValueError, match="a prompt of 65 tokens: a slot has room for 64"):
        pair.add([prompt_of([5] * 65)])
    slots, _ = pair.add([prompt_of([5] * 63)])
    with pytest.raises(ValueError, match="2 sequences for 1 free slots of 2"):
        pair.add([prompt_of([5]), prompt_of([6])])
    pair.step(slots, np.array([5], np.int32))
    with pytest.raises(ValueError, match="slot 0 is full: it has room for 64 tokens"):
        pair.step(slots, np.array([5], np.int32))
    pair.free(slots)
    pair.add([prompt_of([5]), prompt_of([6])])


def test_sizes() -> None:
    assert [slot_count(rows) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 16, 24,
    ]  # fmt: skip
    assert [cache_capacity(length) for length in (1, 64, 65, 300)] == [64, 64, 128, 512]


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


def test_decoders_of_a_size_share_graphs_and_nothing_else(
    compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, words = decoder_pool("glm3_tiny"), [[5, 6, 7], [100, 200], [9], [300, 8, 44, 3, 2]]
    alone = [greedy_alone(pool.decoder(2, 9), one, 6)[0] for one in words]
    compilations.clear()
    monkeypatch.delattr("glm_ms.generation.decoder.DecoderGraphs.__init__")  # its cache would take memory and time
    decoders = [pool.decoder(2, 9 + 9 * index) for index in range(len(words))]
    running = [(decoder, *decoder.add([prompt_of(one)])) for decoder, one in zip(decoders, words)]
    found = [[int(logits.argmax())] for _, _, logits in running]
    while len(found[0]) < 6:
        for (decoder, slots, _), tokens in zip(running, found):
            if len(tokens) == 3:  # its slots have moved: it is the copies that go on
                decoder.free(slots)
                slots[:] = decoder.fork(slots)
            tokens.append(int(decoder.step(slots, np.array(tokens[-1:], np.int32)).argmax()))
    assert found == alone
    assert compilations in ([], ["CopySlots"])  # another test may have forked before


def test_memory_of_decoders_that_have_ended_is_used_again_or_freed() -> None:
    pool, ids = decoder_pool("glm3_tiny"), [prompt_of([5, 6, 7])]
    first, second = pool.decoder(1, 9), pool.decoder(1, 9)
    table, places = first.cache.keys[0], []
    for decoder in (first, second):
        (slot,), logits = decoder.add(ids)
        places.append(table.data_ptr())
    assert places[0] != places[1]
    del decoder, second
    third = pool.decoder(1, 9)
    third.add(ids)
    assert table.data_ptr() == places[1]
    pool.decoder(2, 9)
    assert np.abs(table.asnumpy()).max() > 0, "the third one is still there"
    del third
    pool.decoder(2, 9)
    assert np.abs(table.asnumpy()).max() == 0
    first.free([slot])
    np.testing.assert_array_equal(first.add(ids)[1], logits)


def test_streams_in_several_threads_of_a_pynative_program() -> None:
    model, mode = golden_model("glm3_tiny"), ms.get_context("mode")
    prompts = [[5, 6, 7], [100, 200], [5, 6, 7]]
    expected = [model.generate(prompt, max_new_tokens=8) for prompt in prompts]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        barrier = threading.Barrier(len(prompts))

        def run(prompt: list[int]) -> list[list[int]]:
            steps = model.stream(prompt, max_new_tokens=8)
            barrier.wait()
            return [prompt + np.concatenate(list(steps)).tolist()]

        with ThreadPoolExecutor(len(prompts)) as threads:
            results = threads.map(run, prompts)
            assert ms.get_context("mode") == ms.PYNATIVE_MODE
            assert list(results) == expected
        assert ms.get_context("mode") == ms.PYNATIVE_MODE
    finally:
        ms.set_context(mode=mode)


def test_configs_of_each_prompt() -> None:
    model, rows = golden_model("glm3_tiny"), [[5, 6, 7, 8], [9, 10], [9, 10]]
    options = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 3},
        {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.3},
    ]
    configs = [GenerationConfig(**one) for one in options]
    alone = [model.generate(row, eos_token_id=[], **one)[0] for row, one in zip(rows, options)]
    assert model.generate(rows, configs=configs) == alone
    steps = np.stack(list(model.stream(rows, configs=configs)), axis=1).tolist()
    assert [steps[0][:5], *steps[1:]] == [row[len(prompt) :] for row, prompt in zip(alone, rows)]
    with pytest.raises(ValueError, match="configs: 2 for 3 prompts"):
        model.generate(rows, configs=configs[:2])
    with pytest.raises(ValueError, match="top_k: give options or configs"):
        model.generate(rows, configs=configs, top_k=3)
    with pytest.raises(ValueError, match="beam"):
        model.stream(rows, configs=[*configs[:2], GenerationConfig(2, num_beams=2)])


def test_the_graph_thread_runs_one_function_at_a_time() -> None:
    graphs, seen = GraphThread(), []

    def work(number: int) -> int:
        seen.append(("start", number, threading.current_thread().name))
        assert graphs.run(lambda: number) == number  # from its own thread
        seen.append(("end", number, threading.current_thread().name))
        return number * number

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda number: graphs.run(work, number), range(20))) == [
            number * number for number in range(20)
        ]
    assert all(one[1:] == other[1:] for one, other in zip(seen[::2], seen[1::2]))
    assert {name for *_, name in seen} == {"glm_ms graphs"}
    with pytest.raises(ZeroDivisionError):
        graphs.run(lambda: 1 / 0)
    assert graphs.run(len, "ab") == 2, "an error does not end the thread"


@pytest.mark.parametrize(
    "program",
    [
        # A thread that is still at work when the main thread has ended.
        "import threading, time\n"
        "def work():\n    time.sleep(0.5); print(GRAPHS.run(lambda: 'done'))\n"
        "GRAPHS.run(lambda: 0); threading.Thread(target=work).start()",
        # A child process, which has no copy of the graph thread.
        "import os\nGRAPHS.run(lambda: 0)\nchild = os.fork()\n"
        "if not child: print(GRAPHS.run(lambda: 'done'), flush=True); os._exit(0)\nos.waitpid(child, 0)",
        "import atexit\nGRAPHS.run(lambda: 0); atexit.register(lambda: print(GRAPHS.run(lambda: 'done')))",
    ],
    ids=["after the main thread", "after a fork", "at exit"],
)
def test_the_graph_thread_serves_every_caller(program: str, repository) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from glm_ms.generation.graphs import GRAPHS\n{program}"],
        cwd=repository, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["done"]), done.stderr


def test_nan_of_one_call_does_not_reach_the_next() -> None:
    """The next call of the size gets the memory of the last one, in which NaN has the weight 0: 0 x NaN is NaN."""
    model = fresh_golden_model("glm3_tiny")
    prompt, longer = [5, 17, 300], [9, 8, 7, 6, 5, 4]
    expected = model.generate(prompt, max_new_tokens=4)
    weight = model.parameters()["transformer.encoder.layers.0.self_attention.query_key_value.bias"]
    good = weight.asnumpy().copy()
    weight.set_data(ms.Tensor(np.full_like(good, np.nan)))
    with pytest.raises(FloatingPointError):
        model.generate(longer, max_new_tokens=4)
    weight.set_data(ms.Tensor(good))
    assert model.generate(prompt, max_new_tokens=4) == expected
