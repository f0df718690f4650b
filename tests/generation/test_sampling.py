"""Filters against golden numbers, seeded draws, and the options."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tolerances import PROBABILITY

from glm_ms.generation import sampling
from glm_ms.generation.config import GenerationConfig


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "sampling.json").read_text())


@pytest.fixture(scope="module")
def rows(cases):
    return [(np.array([row["logits"]], np.float32), np.array([row["input_ids"]])) for row in cases["rows"]]


def filtered(config, scores, input_ids):
    history = sampling.History(config, input_ids, scores.shape[1])
    return sampling.apply_filters(sampling.build_filters(config), scores, history)


def test_filters_keep_the_golden_tokens_with_the_golden_probabilities(cases, rows):
    for case in cases["filters"]:
        config = GenerationConfig(max_new_tokens=1, do_sample=True, **case["params"])
        scores = filtered(config, *rows[case["row"]])
        kept = np.flatnonzero(scores[0] > -np.inf)
        want = dict(case["probs"])
        assert kept.tolist() == sorted(want), case["params"]
        assert len(kept) == case["num_kept"]
        got = sampling.softmax(scores)[0]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[kept], [want[token] for token in kept], **PROBABILITY)
        assert not got[np.setdiff1d(np.arange(got.size), kept)].any()


def test_filters_of_a_batch_are_those_of_its_rows(cases, rows):
    for case in cases["filters"]:
        if case["row"] == 0:
            config = GenerationConfig(max_new_tokens=1, do_sample=True, **case["params"])
            both = filtered(config, *(np.concatenate(pair) for pair in zip(rows[0], rows[1])))
            for index in (0, 1):
                np.testing.assert_array_equal(both[index], filtered(config, *rows[index])[0])


def test_invalid_score_rule(cases):
    for case in cases["invalid_score"]:
        scores = np.array(case["scores"], np.float32)
        np.testing.assert_array_equal(sampling.replace_invalid_scores(scores), np.float32(case["result"]))


def test_filters_leave_their_input_alone(rows):
    scores, input_ids = rows[1]
    before = scores.copy()
    filtered(GenerationConfig(1, True, temperature=0.5, top_k=9, top_p=0.5, repetition_penalty=1.3), scores, input_ids)
    np.testing.assert_array_equal(scores, before)


def test_penalty_of_ids_that_occur():
    scores = np.array([[2.0, -2.0, 4.0]], np.float32)
    seen = sampling.mark_seen([np.array([1, 1])], 3)
    assert seen.tolist() == [[False, True, False]]
    assert sampling.penalize_repetition(scores, seen, 2.0).tolist() == [[2.0, -4.0, 4.0]]


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.7, 0.95, 0.9999])
def test_top_p_equals_sorting_everything(spread, top_p):
    """The shortcut that sorts only the best scores, over distributions from flat to peaked."""
    scores = np.random.default_rng(1).normal(0, spread, (3, 65024)).astype(np.float32)
    order = np.argsort(scores, axis=1, kind="stable")
    ascending = np.take_along_axis(sampling.softmax(scores), order, 1)
    removed = ascending.cumsum(axis=1, dtype=np.float64).astype(np.float32) <= np.float32(1 - top_p)
    removed[:, -1] = False
    first = np.take_along_axis(scores, order, 1)[np.arange(3), removed.sum(axis=1)]
    got = sampling.keep_top_p(scores, top_p) > -np.inf
    np.testing.assert_array_equal(got, scores >= first[:, None])


def test_min_p_is_a_part_of_the_likeliest():
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]], np.float32))
    kept = sampling.keep_min_p(scores, 0.4) > -np.inf
    assert kept.tolist() == [[True, True, False, False], [True] * 4]
    assert (sampling.keep_min_p(scores, 1.0) > -np.inf)[0].tolist() == [True, False, False, False]


def test_penalties_count_generated_tokens_only():
    """By hand: presence 0.5 once, frequency 0.25 for each occurrence, nothing for the prompt."""
    config = GenerationConfig(9, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = sampling.RowSampler(config, np.array([0, 0, 0]), 3, np.random.default_rng(0), 0)
    scores = np.array([1.0, 0.9, -3.0], np.float32)
    # Token 0 loses 0.75, so 1 wins; then 1 loses as much: 0.25 against 0.15; then 0 has lost 1.0.
    assert [sampler(scores) for _ in range(5)] == [0, 1, 0, 1, 0]
    np.testing.assert_array_equal(scores, np.float32([1.0, 0.9, -3.0]))
    negative = GenerationConfig(9, presence_penalty=-2.0)
    sampler = sampling.RowSampler(negative, np.array([0]), 3, np.random.default_rng(0), 0)
    assert [sampler(np.float32([1, 0, 0])), sampler(np.float32([0, 1.5, 0]))] == [0, 0]


def test_bias_is_added_in_greedy_decoding_and_sampling():
    scores = np.array([5.0, 1.0, 0.0], np.float32)
    for more in ({}, {"do_sample": True, "top_k": 1, "seed": 0}):
        config = GenerationConfig(1, logit_bias={1: 3.0, 0: -4.0, np.int64(2): -1}, **more)
        [sampler] = sampling.row_samplers([np.array([0])], [config], 3)
        assert sampler(scores) == 1
        with pytest.raises(ValueError, match=r"logit_bias = 2: .* ids 0..1"):
            sampling.row_samplers([np.array([0])], [config], 2)


def test_no_end_before_min_new_tokens():
    config = GenerationConfig(9, eos_token_id=[0, 1], min_new_tokens=2)
    [sampler] = sampling.row_samplers([np.array([0])], [config], 3)
    assert [sampler(np.float32([5, 4, 0])) for _ in range(4)] == [2, 2, 0, 0]


def test_a_mask_allows_some_tokens_only():
    config = GenerationConfig(9, eos_token_id=0, min_new_tokens=5, repetition_penalty=2.0)
    [sampler] = sampling.row_samplers([np.array([1])], [config], 3)
    scores = np.float32([5, 4, 1])
    assert sampler(scores, np.array([False, True, True])) == 1
    assert sampler(scores, np.array([True, False, True])) == 2
    assert sampler(scores, np.array([True, False, False])) == 0, "the grammar wants the end"
    replaced = GenerationConfig(9, replace_invalid_scores=True)
    [sampler] = sampling.row_samplers([np.array([1])], [replaced], 9)
    assert sampler(np.arange(9, dtype=np.float32), np.arange(9) < 3) == 2, "a mask is no invalid score"


def test_top_p_keeps_ties_together_and_at_least_one():
    scores = np.array([[1.0, 3.0, 3.0, 0.0]], np.float32)
    assert (sampling.keep_top_p(scores, 0.1) > -np.inf).tolist() == [[False, True, True, False]]
    assert (sampling.keep_top_p(scores[:, :2], 1e-12) > -np.inf).tolist() == [[False, True]]


def test_the_largest_are_those_of_a_sort():
    rng = np.random.default_rng(4)
    for size in (1, 63, 64, 500, 65024):
        for values in (rng.normal(size=size), rng.integers(0, 5, size), np.full(size, -np.inf), np.arange(size)):
            values = values.astype(np.float32)
            order = np.argsort(-values, kind="stable")
            for k in {1, min(2, size), min(40, size), size}:
                assert sampling.kth_largest(values, k) == values[order[k - 1]]
                np.testing.assert_array_equal(sampling.largest(values, k), order[:k])
    assert sampling.largest(np.float32([1, 2]), 9).tolist() == [1, 0]


def test_top_k_above_the_vocabulary_keeps_all():
    scores = np.array([[1.0, 3.0]], np.float32)
    np.testing.assert_array_equal(sampling.keep_top_k(scores, 9), scores)


def test_draws_follow_the_distribution():
    wanted = np.array([0.1, 0.0, 0.6, 0.3])
    with np.errstate(divide="ignore"):
        scores = np.log(wanted, dtype=np.float32)
    generator = sampling.row_generator([1], 5, 0)
    count = 20000
    drawn = [sampling.draw(scores, generator) for _ in range(count)]
    frequency = np.bincount(drawn, minlength=4) / count
    assert frequency[1] == 0
    # Four standard deviations of a binomial frequency.
    assert (np.abs(frequency - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all()


class _Extreme:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def test_draw_stays_on_candidates_at_the_ends_of_the_unit_interval():
    scores = np.array([-np.inf, 0.0, 1.0, -200.0, -np.inf], np.float32)
    assert sampling.draw(scores, _Extreme(0.0)) == 1
    assert sampling.draw(scores, _Extreme(1 - 2.0**-53)) == 2


def _first_tokens(prompts, *configs):
    """One draw of each row from 2 ** 20 equal scores."""
    samplers = sampling.row_samplers([np.array(prompt, np.int32) for prompt in prompts], configs, 2**20)
    return [sampler(np.zeros(2**20, np.float32)) for sampler in samplers]


def test_streams_depend_on_seed_prompt_and_copy_only():
    two = GenerationConfig(1, do_sample=True, seed=3, num_return_sequences=2)
    one = dataclasses.replace(two, num_return_sequences=1)
    alone = _first_tokens([[7, 8]], two)
    assert _first_tokens([[1], [7, 8]], two, two)[2:] == alone
    assert _first_tokens([[7, 8], [1]], one, one)[0] == alone[0]
    assert _first_tokens([[7, 8], [7, 8]], one, one) == alone, "copies continue the count"
    seed_4 = dataclasses.replace(one, seed=4)
    mixed = _first_tokens([[7, 8], [7, 8], [7, 8]], seed_4, one, one)
    assert mixed[1:] == alone, "rows with other options do not count"
    others = _first_tokens([[8, 7], [7, 8, 0], [7], [0], [0, 0]], *[one] * 5)
    numbers = [*alone, *others, mixed[0]]
    assert len(set(numbers)) == len(numbers)


def test_without_a_seed_every_call_differs():
    config = GenerationConfig(1, do_sample=True)
    assert _first_tokens([[7]], config) != _first_tokens([[7]], config)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_broken_scores_are_reported(bad):
    with pytest.raises(FloatingPointError, match=r"token 3: the scores of row 1 .* float32"):
        sampling.check_scores(np.array([[0.0, 1.0], bad], np.float32), 3)
    sampling.check_scores(np.array([[-np.inf, 1.0]], np.float32), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens = 2.0: expected an int, found float"),
        ({"max_new_tokens": True}, "max_new_tokens = True: expected an int"),
        ({"do_sample": 1}, "do_sample = 1: expected True or False"),
        ({"early_stopping": "never"}, "early_stopping = 'never': expected True or False"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature = 0.0: must be in .*do_sample = False"),
        ({"temperature": -1, "do_sample": True}, r"temperature = -1: must be in \[1e-06, 1e\+06\]"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature = nan: must be in"),
        ({"temperature": None}, "temperature = None: expected a number"),
        ({"top_p": 0.0, "do_sample": True}, r"top_p = 0: must be in \(0, 1\]"),
        ({"top_p": 1.5, "do_sample": True}, r"top_p = 1.5: must be in \[0, 1\]"),
        ({"top_k": -1, "do_sample": True}, "top_k = -1: must be at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0: must be in"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf: must be in"),
        ({"min_p": 1.5, "do_sample": True}, r"min_p = 1.5: must be in \[0, 1\]"),
        ({"min_p": True, "do_sample": True}, "min_p = True: expected a number"),
        ({"presence_penalty": 3}, r"presence_penalty = 3: must be in \[-2, 2\]"),
        ({"frequency_penalty": -2.5}, r"frequency_penalty = -2.5: must be in \[-2, 2\]"),
        ({"min_new_tokens": 5}, "min_new_tokens = 5: at most max_new_tokens = 4"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1: must be at least 0"),
        ({"logit_bias": [1]}, r"logit_bias = \[1\]: expected a mapping"),
        ({"logit_bias": {"1": 1}}, "logit_bias = '1': expected an int"),
        ({"logit_bias": {-1: 1}}, "logit_bias = -1: must be at least 0"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] = 101: must be in \[-100, 100\]"),
        ({"logit_bias": {1: None}}, r"logit_bias\[1\] = None: expected a number"),
        ({"length_penalty": 5000.0, "num_beams": 2}, r"length_penalty = 5000.0: must be in \[-20, 20\]"),
        ({"length_penalty": "1"}, "length_penalty = '1': expected a number, found str"),
        ({"num_beams": 0}, "num_beams = 0: must be at least 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences = 3: at most num_beams = 2"),
        ({"num_return_sequences": 2}, "num_return_sequences = 2: greedy decoding has one result"),
        ({"num_beams": 2, "do_sample": True}, "do_sample = True with num_beams = 2"),
        ({"eos_token_id": []}, r"eos_token_id = \[\]: expected an id"),
        ({"eos_token_id": "2"}, "eos_token_id = '2': expected an id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id = -1: must be at least 0"),
        ({"pad_token_id": None}, "pad_token_id = None: expected an int"),
        ({"seed": -5}, "seed = -5: must be at least 0"),
        ({"top_kk": 3}, "unknown option 'top_kk'; did you mean top_k"),
        ({"zzz": 3}, "unknown option 'zzz'; known: max_new_tokens"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        GenerationConfig.from_dict({"max_new_tokens": 4, **options}, source="here")


def test_max_new_tokens_has_no_default():
    with pytest.raises(ValueError, match="max_new_tokens is missing"):
        GenerationConfig.from_dict({})


def test_options_without_effect_are_a_visible_warning():
    with pytest.warns(UserWarning, match="temperature, top_k: no effect without do_sample = True") as caught:
        GenerationConfig(max_new_tokens=1, temperature=0.5, top_k=3)
    assert caught[0].filename == __file__
    for name, value in (("temperature", 0), ("top_p", 3), ("top_p", 0), ("top_k", -1), ("min_p", 2)):
        with pytest.warns(UserWarning, match=f"{name}: no effect"):
            GenerationConfig(max_new_tokens=1, **{name: value})
    with pytest.warns(UserWarning, match="length_penalty: no effect without num_beams > 1"):
        GenerationConfig(max_new_tokens=1, length_penalty=2.0)


def test_end_ids_are_distinct_and_must_exist():
    config = GenerationConfig(max_new_tokens=1, eos_token_id=[9, np.int64(2), 9])
    assert config.eos_ids == (9, 2)
    assert GenerationConfig(max_new_tokens=1).eos_ids == ()
    assert GenerationConfig(max_new_tokens=1, eos_token_id=0).eos_ids == (0,)
    config.check_vocab_size(10)
    with pytest.raises(ValueError, match=r"eos_token_id = 9: .* ids 0..8"):
        config.check_vocab_size(9)
