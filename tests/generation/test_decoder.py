"""Generation over the real network: sizes, the pool of decoders, threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from reference import fresh_golden_model, golden_model

from glm_ms.generation import GenerationConfig
from glm_ms.generation.decoder import cache_capacity, slot_count
from glm_ms.generation.graphs import GraphThread
from glm_ms.generation.inputs import prepare_prompts
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.pool import DecoderPool

# Prompts of one size.
WORDS = [[5, 6, 7], [100, 200], [9], [300, 8, 44, 3, 2]]


@cache
def decoder_pool() -> DecoderPool:
    """Shared by the tests: each size has graphs to compile."""
    return DecoderPool(golden_model("glm3_tiny").network)


def start(decoder: PagedDecoder, ids: list[int]) -> tuple[list[int], np.ndarray]:
    return decoder.add([prepare_prompts(ids, vocab_size=512)[0]])


def test_sizes() -> None:
    assert [slot_count(rows) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 16, 24,
    ]  # fmt: skip
    assert [cache_capacity(length) for length in (1, 64, 65, 300)] == [64, 64, 128, 512]


def test_decoders_of_a_size_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = decoder_pool()
    first = pool.decoder(2, 9)
    monkeypatch.delattr("glm_ms.generation.page_graphs.PageGraphs.__init__")  # its cache would take memory and time
    assert {pool.decoder(2, 9 + 9 * index).graphs for index in range(4)} == {first.graphs}


def test_portable_memory_of_decoders_that_have_ended_is_used_again_or_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_MS_CPU_KERNELS", "0")
    pool, ids = DecoderPool(golden_model("glm3_tiny").network), WORDS[0]
    assert pool.make_graphs.why_portable == "GLM_MS_CPU_KERNELS=0"
    first, second = pool.decoder(2, 9), pool.decoder(2, 9)
    table, places = first.graphs.cache.keys[0], []
    for decoder in (first, second):
        slots, logits = start(decoder, ids)
        places.append(table.data_ptr())
    assert places[0] != places[1]
    del decoder, second
    third = pool.decoder(2, 9)
    start(third, ids)
    assert table.data_ptr() == places[1]
    pool.decoder(1, 9)
    assert np.abs(table.asnumpy()).max() > 0, "the third one is still there"
    del third
    pool.decoder(1, 9)
    assert np.abs(table.asnumpy()).max() == 0
    first.free(slots)
    np.testing.assert_array_equal(start(first, ids)[1], logits)


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


def test_answers_join_in_few_slots() -> None:
    model = golden_model("glm3_tiny")
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 3, "eos_token_id": list(range(100))}
    prompts = [*WORDS, WORDS[0], [*WORDS[2], 8]]
    alone = dict(model.answers(prompts, slots=1, **options))
    together = list(model.answers(prompts, slots=2, **options))
    assert dict(together) == alone
    assert [number for number, _ in together] != sorted(alone), "some end before others that came first"
    assert len({len(ids) for (ids,) in alone.values()}) > 1
    assert alone[0] != alone[4], "the second sequence of the same prompt"
    assert dict(model.answers(prompts[4:], slots=2, copies=[1, 0], **options)) == {0: alone[4], 1: alone[5]}
