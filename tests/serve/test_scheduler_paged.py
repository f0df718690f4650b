"""The scheduler over the paged decoder of a real network: a request gets the same bits alone and in any company."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from marks import slow_unless
from numpy_glm import NumpyGLM
from reference import FOLDER, fresh_golden_model, golden_model
from tolerances import LOGITS

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.generation.sampling import log_softmax
from glm_ms.peft.adapter import read_adapter
from glm_ms.peft.rows import AdapterBounds
from glm_ms.serve.answer import Answer
from glm_ms.serve.scheduler import Job, Scheduler

SLOTS, CAPACITY, CHUNK = 4, 64, 32
ADAPTERS = {
    "lora": FOLDER.parent / "train" / "lora" / "final",
    "prefix": FOLDER.parent / "train" / "ptuning_v2" / "final.safetensors",
}
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.9}


@pytest.fixture(scope="module")
def decoder() -> PagedDecoder:
    bounds = AdapterBounds(max_adapters=2, max_rank=8, max_prefix=16)
    made = PagedDecoder(PagedGraphs(fresh_golden_model("glm2_tiny").network, SLOTS, CAPACITY, CHUNK, bounds))
    made.compile()
    for name, path in ADAPTERS.items():
        made.load_adapter(name, read_adapter(path))
    return made


def jobs(count: int) -> list[Job]:
    """Of all kinds; two of three begin with one of two system prompts, whose pages are found again."""
    generator = np.random.default_rng(3)
    systems = [generator.integers(3, 400, size).tolist() for size in (37, 33)]
    made = []
    for number in range(count):
        system = systems[number % 3] if number % 3 < 2 else []
        ids = system + generator.integers(3, 400, generator.integers(1, 52 - len(system))).tolist()
        options = [
            {},
            {**SAMPLED, "seed": 5, "num_return_sequences": 1 + number % 3},
            {**SAMPLED, "seed": number, "min_p": 0.05, "presence_penalty": 1.0},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "eos_token_id": list(range(40))},
        ][number % 4]
        config = GenerationConfig(1 + number % 11, **options)
        adapter = [None, None, "lora", None, "prefix"][number % 5]
        made.append(Job(ids, config, adapter, logprobs=3, prompt_logprobs=number % 6 == 0))
    return made


def read(answer: Answer) -> tuple:
    """Tokens and log-probabilities of all choices and of the prompt, texts, and how each choice ended."""
    found: dict[int, list] = {}
    for event in answer.events():
        texts, tokens, ends = found.setdefault(event.choice, [[], [], []])
        texts.append(event.text)
        tokens.extend(event.tokens)
        ends.append((event.finish, event.stop_reason))
    choices = [("".join(found[choice][0]), found[choice][1], found[choice][2][-1]) for choice in sorted(found)]
    return choices, answer.prompt_scores


@pytest.fixture(scope="module")
def alone(decoder, tokenizer) -> list[tuple]:
    """What 24 jobs get, each with a decoder that has seen nothing."""
    results = []
    for job in jobs(24):
        decoder.reset()
        scheduler = Scheduler(decoder, tokenizer)
        answer = scheduler.submit(job)
        while scheduler.round():
            pass
        results.append(read(answer))
    return results


@pytest.mark.parametrize("seed", slow_unless([0], range(8)))
def test_the_same_bits_alone_and_in_company(decoder, tokenizer, alone, seed):
    """24 clients in threads come in any order; some others leave in the middle."""
    decoder.reset()
    idle = decoder.pages_used  # of prefixes
    scheduler = Scheduler(decoder, tokenizer)
    scheduler.start()
    found: dict[int, tuple] = {}
    order, given = np.random.default_rng(seed).permutation(24).tolist(), jobs(24)

    def client(numbers: list[int]) -> None:
        for number in numbers:
            other = scheduler.submit(given[(number + 1) % 24])
            found[number] = read(scheduler.submit(given[number]))
            other.cancel()

    clients = [threading.Thread(target=client, args=(order[start::6],)) for start in range(6)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert scheduler.drain(60)
    scheduler.close()
    assert [found[number] for number in range(24)] == alone
    assert scheduler.stats.cached_tokens > 0
    assert decoder.pages_used == idle


@pytest.mark.slow
def test_the_same_as_generate(alone):
    given = [job for job in jobs(24) if job.adapter is None]
    sequences = golden_model("glm2_tiny").generate([job.ids for job in given], configs=[job.config for job in given])
    own = [
        job.ids + [score.token for score in tokens]
        for job, (choices, _) in zip(jobs(24), alone)
        if job.adapter is None
        for _, tokens, _ in choices
    ]
    assert own == sequences


def test_log_probabilities_of_the_prompt_are_those_of_the_network(alone):
    network, checked = NumpyGLM(FOLDER / "glm2_tiny"), 0
    for job, (choices, scores) in zip(jobs(24), alone):
        if not job.prompt_logprobs:
            assert scores is None
            continue
        if job.adapter is not None:
            continue
        ids = list(job.ids) + [score.token for score in choices[0][1]]
        row = np.array([ids])
        want = log_softmax(network.logits(row, np.ones_like(row), np.arange(len(ids))[None])[0])
        got = [*scores, *choices[0][1]]
        assert [score.token for score in got] == ids[1:]
        np.testing.assert_allclose([s.logprob for s in got], want[np.arange(len(ids) - 1), ids[1:]], **LOGITS)
        checked += len(got)
    assert checked > 60
