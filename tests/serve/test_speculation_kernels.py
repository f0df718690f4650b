"""Prompt lookup over the C++ kernels: the tokens and log-probabilities of single steps, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor
from serve.fakes import collected

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.generation import speculation
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.paged import PagedDecoder
from glm_ms.ops.cpu import library
from glm_ms.serve.scheduler import Job, Scheduler

VOCABULARY = 96
EVERY_WAY = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.05, "frequency_penalty": 0.05},
    "sampled": {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "seed": 5},
    "several": {"do_sample": True, "temperature": 0.2, "seed": 6, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals cost nearly nothing, whatever the clock says."""
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    monkeypatch.setattr(speculation._Cost, "price", lambda self: 0.02)


@pytest.fixture(scope="module")
def model() -> GLMForCausalLM:
    """A random network, which soon repeats itself."""
    found = GLMForCausalLM(
        GLMConfig(
            num_layers=2, padded_vocab_size=VOCABULARY, hidden_size=40, ffn_hidden_size=56, kv_channels=12,
            num_attention_heads=6, multi_query_group_num=2, seq_length=256,
        )
    )  # fmt: skip
    generator = np.random.default_rng(0)
    for name, parameter in found.parameters().items():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_data(Tensor(generator.normal(center, 0.2, parameter.shape).astype(np.float32), parameter.dtype))
    return found


def prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, VOCABULARY, generator.integers(2, 40)).tolist() for _ in range(count)]


@pytest.mark.parametrize("options", EVERY_WAY.values(), ids=EVERY_WAY)
def test_generate_and_stream(model: GLMForCausalLM, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    extend = PagedDecoder.extend

    def counted(self, slots, tokens):
        sizes.append(sum(map(len, tokens)))
        return extend(self, slots, tokens)

    monkeypatch.setattr(PagedDecoder, "extend", counted)
    common = {"max_new_tokens": 80, "eos_token_id": [2], **options}
    wanted = model.generate(prompts(6), prompt_lookup_num_tokens=0, **common)
    assert not sizes
    assert model.generate(prompts(6), **common) == wanted
    assert sizes
    streams = [
        np.stack(list(model.stream(prompts(2), prompt_lookup_num_tokens=most, **common))).tolist() for most in (0, 7)
    ]
    assert streams[0] == streams[1]


def test_the_server_gives_the_same_log_probabilities(model: GLMForCausalLM, tokenizer) -> None:
    found = []
    for most in (0, 10):
        decoder = PagedDecoder(GraphMaker(model.network)(4, 128))
        scheduler = Scheduler(decoder, tokenizer)
        answers = []
        for number, ids in enumerate(prompts(8)):
            options = [*EVERY_WAY.values()][number % 4]
            config = GenerationConfig(60 + number, prompt_lookup_num_tokens=most, **options)
            answers.append(scheduler.submit(Job(ids, config, logprobs=2)))
            scheduler.round()
        while scheduler.round():
            pass
        found.append([collected(answer) for answer in answers])
        assert decoder.pages_used == 0
        totals = scheduler.stats.speculation
    assert found[0] == found[1]
    assert totals.accepted > 30
