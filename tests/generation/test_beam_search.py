"""Beam search against golden sequences and scores, and against exhaustive search."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from numpy_glm import NumpyGLM
from slot_decoder import SlotDecoder
from tolerances import BEAM_SCORE

from glm_ms.generation import decode
from glm_ms.generation.beam_search import BeamHypothesis, BeamSearch
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.inputs import Prompt, new_token_limits, prepare_prompts


@pytest.fixture(scope="module")
def tiny(golden):
    return NumpyGLM(golden / "models" / "glm2_tiny")


def beam_search(decoder: SlotDecoder, prompts: list[Prompt], config: GenerationConfig) -> list[list[BeamHypothesis]]:
    """The hypotheses of each prompt, best first."""
    limits = new_token_limits(prompts, [config] * len(prompts))
    searches = [
        BeamSearch(prompt, config, number, limit, decoder.vocab_size, number * config.num_beams)
        for number, (prompt, limit) in enumerate(zip(prompts, limits))
    ]
    assert len(list(decode.run(decoder, searches))) == len(searches)
    return [search.hypotheses() for search in searches]


def test_golden_beams(golden, tiny):
    data = np.load(golden / "models" / "glm2_tiny" / "golden.npz")
    cases = json.loads((golden / "sampling.json").read_text())["beam_search"]
    assert len(cases) == 12
    for case in cases:
        count = 1 if case["input"] == "row0_alone" else 2
        inputs = prepare_prompts(data["input_ids"][:count], data["attention_mask"][:count], vocab_size=512)
        config = GenerationConfig(**case["params"])
        ranked = [one for row in beam_search(tiny, inputs, config) for one in row]
        start = case["prompt_length"]
        lengths = case["generated_lengths"]
        want = [row[start : start + length] for row, length in zip(case["sequences"], lengths)]
        assert [one.token_ids for one in ranked] == want
        np.testing.assert_allclose([one.score for one in ranked], case["sequences_scores"], **BEAM_SCORE)
        np.testing.assert_allclose([one.sum_log_probs for one in ranked], case["sum_log_probs"], **BEAM_SCORE)

        whole = [row[: start + length] for row, length in zip(case["sequences"], lengths)]
        padding = np.repeat([start - len(prompt.ids) for prompt in inputs], config.num_return_sequences)
        expected = [row[skip:] for row, skip in zip(whole, padding)]
        assert generate(tiny, inputs, config) == expected
        fewer = GenerationConfig(**{**case["params"], "num_return_sequences": 1})
        assert generate(tiny, inputs, fewer) == expected[:: config.num_return_sequences]


class Table(SlotDecoder):
    """A network whose next scores depend on the whole sequence through a random table."""

    def __init__(self, vocab_size, seed=0):
        super().__init__()
        self.vocab_size, self.seed = vocab_size, seed

    def log_probs(self, sequence):
        scores = np.random.default_rng([self.seed, *sequence]).normal(0, 2, self.vocab_size)
        return scores - np.log(np.exp(scores).sum())

    def scores(self, rows):
        return np.array([self.log_probs(row.ids) for row in rows], np.float32)


def generate(decoder, prompts, config):
    found = decode.generate(decoder, prompts, [config] * len(prompts))
    assert not decoder.rows, "every slot is freed"
    return found


def every_sequence(table, prompt, eos_ids, length, penalty, adjusted=lambda log_probs, before: log_probs):
    """All sequences that end with an end id or at `length`, best score first.

    `adjusted` changes log probabilities by the tokens generated before.
    """
    found = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(table.vocab_size), repeat=size):
            ended = tokens[-1] in eos_ids
            if any(token in eos_ids for token in tokens[:-1]) or (size < length and not ended):
                continue
            steps = ((table.log_probs([*prompt, *tokens[:i]]), tokens[:i], tokens[i]) for i in range(size))
            total = sum(adjusted(log_probs, before)[token] for log_probs, before, token in steps)
            found.append((total / size**penalty, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos", [None, 3, [3, 1]])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beams_find_what_exhaustive_search_finds(penalty, eos, seed):
    """With as many beams as there are prefixes nothing is cut off, so the best must be found."""
    table, prompt = Table(4, seed), [2, 0, 2]
    # Length 3 leaves at most 4 * 4 prefixes of 2 tokens.
    config = GenerationConfig(3, num_beams=16, eos_token_id=eos, length_penalty=penalty)
    inputs = prepare_prompts(prompt, vocab_size=4)
    (best,) = beam_search(table, inputs, config)[0]
    score, tokens = every_sequence(table, prompt, config.eos_ids, 3, penalty)[0]
    assert best.token_ids == tokens
    np.testing.assert_allclose(best.score, score, **BEAM_SCORE)


@pytest.mark.parametrize("seed", range(6))
def test_bias_and_penalties_follow_each_beam(seed):
    table, prompt = Table(4, seed), [2, 0, 2]
    options = {"presence_penalty": 1.2, "frequency_penalty": 0.7, "logit_bias": {1: 2.0, 2: -1.0}, "min_new_tokens": 2}
    config = GenerationConfig(3, num_beams=16, eos_token_id=[3, 1], **options)

    def adjusted(log_probs, before):
        counts = np.bincount(before, minlength=4)
        ends = np.array([0, -np.inf, 0, -np.inf]) if len(before) < 2 else 0
        return log_probs + np.array([0, 2, -1, 0]) - 1.2 * (counts > 0) - 0.7 * counts + ends

    (best,) = beam_search(table, prepare_prompts(prompt, vocab_size=4), config)[0]
    score, tokens = every_sequence(table, prompt, config.eos_ids, 3, 1.0, adjusted)[0]
    assert best.token_ids == tokens
    np.testing.assert_allclose(best.score, score, **BEAM_SCORE)


def test_the_end_token_that_was_generated_is_returned():
    ends = set()
    for seed in range(12):
        config = GenerationConfig(6, num_beams=2, num_return_sequences=2, eos_token_id=[5, 2])
        inputs = prepare_prompts([4, 1], vocab_size=6)
        for sequence in generate(Table(6, seed), inputs, config):
            generated = sequence[2:]
            assert not {5, 2} & set(generated[:-1])
            ends.add(generated[-1])
    assert {5, 2} <= ends


@pytest.mark.parametrize("early_stopping", [True, False])
def test_prompts_do_not_influence_each_other(early_stopping):
    prompts = [[4, 5, 6], [7], [8, 4], [9, 9, 9, 9]]
    config = GenerationConfig(
        12, num_beams=3, num_return_sequences=2, eos_token_id=[3, 1], early_stopping=early_stopping
    )
    lengths = set()
    for seed in range(6):
        batch = generate(Table(12, seed), prepare_prompts(prompts, vocab_size=12), config)
        alone = []
        for prompt in prompts:
            alone += generate(Table(12, seed), prepare_prompts(prompt, vocab_size=12), config)
            lengths.add(len(alone[-1]) - len(prompt))
        assert batch == alone
    assert len(lengths) > 3, "prompts end at different steps"


def test_length_that_counts_the_prompt_is_a_limit_for_each():
    prompts = [[1], [2, 3], [4, 1, 2]]
    options = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": 5, "length_penalty": 0.7}
    together = beam_search(
        Table(6), prepare_prompts(prompts, vocab_size=6), GenerationConfig(9, max_length=5, **options)
    )
    for prompt, ranked in zip(prompts, together):
        alone = prepare_prompts(prompt, vocab_size=6)
        assert [ranked] == beam_search(Table(6), alone, GenerationConfig(5 - len(prompt), **options))


def test_no_step_after_the_last_needed_token():
    table, inputs = Table(6), prepare_prompts([4], vocab_size=6)
    generate(table, inputs, GenerationConfig(5, num_beams=2))
    assert table.calls.count("step") == 4
    assert table.calls[-1] == "step"


def test_one_possible_token_is_enough():
    with pytest.raises(ValueError, match="all 2 ids of the vocabulary end a sequence"):
        generate(Table(2), prepare_prompts([1], vocab_size=2), GenerationConfig(2, num_beams=2, eos_token_id=[0, 1]))
    (sequence,) = generate(
        Table(2), prepare_prompts([1], vocab_size=2), GenerationConfig(3, num_beams=4, eos_token_id=0)
    )
    assert sequence[-1] == 0 or len(sequence) == 4
