"""Greedy decoding and sampling over an independent NumPy network, against golden sequences."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from numpy_glm import NumpyGLM
from slot_decoder import SlotDecoder
from tolerances import LOGITS

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decode import answers, generate, stream
from glm_ms.generation.inputs import prepare_prompts

MODELS = (
    "glm2_tiny", "glm3_tiny", "glm3_32k_tiny", "glm2_mha", "glm2_no_final_norm", "glm2_res_post_ln",
    "glm2_bias_layernorm",
)  # fmt: skip
PROMPTS = [[5, 17, 300, 8], [44, 3], [101, 102, 103, 104, 105, 106, 107], [9]]
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "seed": 7, "max_new_tokens": 8}


class Scripted(SlotDecoder):
    """The row of prompt i generates script[i] token by token, whatever it is fed."""

    def __init__(self, script, vocab_size=10):
        super().__init__()
        self.script, self.vocab_size = script, vocab_size

    def scores(self, rows):
        tokens = [self.script[row.number][len(row.ids) - row.prompt_length] for row in rows]
        return np.eye(self.vocab_size, dtype=np.float32)[tokens] * 50


def run(decoder, prompts, config, loop=generate):
    """One config, or one for each prompt."""
    configs = config if isinstance(config, list) else [config] * len(prompts)
    found = loop(decoder, prompts, configs)
    if loop is generate:
        assert not decoder.rows, "every slot is freed"
    return found


@pytest.fixture(scope="module")
def tiny(golden):
    return NumpyGLM(golden / "models" / "glm2_tiny")


def prepare(*args, vocab_size=512, **kwargs):
    return prepare_prompts(*args, vocab_size=vocab_size, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_golden_greedy_sequences(golden, name):
    folder = golden / "models" / name
    data, decoder = np.load(folder / "golden.npz"), NumpyGLM(folder)
    arrays = [data[key].astype(np.int32) for key in ("input_ids", "attention_mask", "position_ids")]
    real = arrays[1] == 1
    np.testing.assert_allclose(decoder.logits(*arrays)[real], data["logits"][real], **LOGITS)

    inputs = prepare(data["input_ids"], data["attention_mask"])
    padding = (arrays[1] == 0).sum(axis=1)
    new = data["greedy_sequences"].shape[1] - arrays[0].shape[1]
    want = [row[skip:].tolist() for row, skip in zip(data["greedy_sequences"], padding)]
    assert run(decoder, inputs, GenerationConfig(new)) == want
    assert decoder.calls.count("step") == new - 1, "the last token needs no further step"

    eos, prompt_length = int(data["greedy_eos_id"]), arrays[0].shape[1]
    config = GenerationConfig(new, eos_token_id=eos)
    steps = np.stack(list(run(decoder, inputs, config, stream)), axis=1)
    # The reference goes on to the full length only if some row does.
    np.testing.assert_array_equal(steps, data["greedy_eos_sequences"][:, prompt_length:][:, : steps.shape[1]])
    assert not data["greedy_eos_sequences"][:, prompt_length + steps.shape[1] :].any()
    for row, got in enumerate(run(decoder, inputs, config)):
        generated = want[row][prompt_length - padding[row] :]
        end = generated.index(eos) + 1 if eos in generated else len(generated)
        assert got == want[row][: len(want[row]) - len(generated) + end]


def test_rows_end_on_their_own_and_are_padded():
    decoder = Scripted([[4, 9, 1, 1, 1], [5, 6, 8, 1, 1], [4, 4, 4, 9, 1]])
    inputs = prepare([[1, 2, 3], [1], [1, 2]], vocab_size=10)
    config = GenerationConfig(5, eos_token_id=[8, 9], pad_token_id=7)
    steps = list(run(decoder, inputs, config, stream))
    assert all(tokens.dtype == np.int32 for tokens in steps)
    assert np.stack(steps, 1).tolist() == [[4, 9, 7, 7], [5, 6, 8, 7], [4, 4, 4, 9]]
    assert decoder.fed == [[4, 5, 4], [6, 4], [4]], "no step for a row that has ended"
    assert decoder.positions == [[3, 1, 2], [2, 3], [4]]
    assert not decoder.rows
    assert run(decoder, inputs, config) == [[1, 2, 3, 4, 9], [1, 5, 6, 8], [1, 2, 4, 4, 4, 9]]


def test_rows_end_at_the_length_that_counts_their_prompt():
    script = [[4, 5, 6, 1], [5, 6, 1, 1], [4, 9, 1, 1]]
    inputs = prepare([[1], [1, 2, 3], [1, 2]], vocab_size=10)
    config = GenerationConfig(9, eos_token_id=9, pad_token_id=7, max_length=4)
    decoder = Scripted(script)
    assert np.stack(list(run(decoder, inputs, config, stream)), 1).tolist() == [
        [4, 5, 6],
        [5, 7, 7],
        [4, 9, 7],
    ]
    assert decoder.positions == [[1, 2], [2]]
    assert run(Scripted(script), inputs, config) == [[1, 4, 5, 6], [1, 2, 3, 5], [1, 2, 4, 9]]
    sooner = GenerationConfig(2, eos_token_id=9, max_length=4)
    assert run(Scripted(script), inputs, sooner) == [[1, 4, 5], [1, 2, 3, 5], [1, 2, 4, 9]]
    with pytest.raises(ValueError, match="max_length = 3: prompt 1 has 3 tokens"):
        run(Scripted(script), inputs, GenerationConfig(2, max_length=3))
    with pytest.raises(ValueError, match="max_length = 1: must be at least 2"):
        GenerationConfig(2, max_length=1)


def test_a_padding_id_that_is_generated_is_a_token_like_others():
    decoder = Scripted([[0, 4, 0], [9, 1, 1]])
    config = GenerationConfig(3, eos_token_id=9, pad_token_id=0)
    assert run(decoder, prepare([[1], [2]]), config) == [[1, 0, 4, 0], [2, 9]]
    both = GenerationConfig(3, eos_token_id=0, pad_token_id=0)
    assert run(Scripted([[0, 4, 0], [9, 1, 1]]), prepare([[1], [2]]), both) == [[1, 0], [2, 9, 1, 1]]


def test_positions_go_on_from_those_given():
    decoder = Scripted([[4, 5, 6]])
    run(decoder, prepare([1, 2], position_ids=[10, 11]), GenerationConfig(3))
    assert decoder.positions == [[12], [13]]


def test_stream_computes_a_step_only_when_asked():
    decoder = Scripted([[4, 5, 6]])
    steps = run(decoder, prepare([1]), GenerationConfig(3), stream)
    assert next(steps).tolist() == [4]
    assert decoder.fed == []
    assert next(steps).tolist() == [5]
    assert decoder.fed == [[4]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 8},
        {"max_new_tokens": 8, "repetition_penalty": 1.4},
        SAMPLING,
        {**SAMPLING, "repetition_penalty": 1.4, "num_return_sequences": 3},
        {**SAMPLING, "top_p": 1.0, "top_k": 40},
        {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.4},
    ],
)
def test_a_prompt_in_a_batch_gives_what_it_gives_alone(tiny, options):
    config = GenerationConfig(**options)
    alone = [run(tiny, prepare(prompt), config) for prompt in PROMPTS]
    assert run(tiny, prepare(PROMPTS), config) == [*chain(*alone)]
    assert run(tiny, prepare(PROMPTS[::-1]), config) == [*chain(*alone[::-1])]


def test_sampling_repeats_with_its_seed_only(tiny):
    inputs = prepare(PROMPTS)
    first = run(tiny, inputs, GenerationConfig(**SAMPLING))
    assert run(tiny, inputs, GenerationConfig(**SAMPLING)) == first
    assert run(tiny, inputs, GenerationConfig(**{**SAMPLING, "seed": 8})) != first
    unseeded = GenerationConfig(**{**SAMPLING, "seed": None})
    assert run(tiny, inputs, unseeded) != run(tiny, inputs, unseeded)


def test_return_sequences_differ_and_extend_one_another(tiny):
    three = run(tiny, prepare([5, 6]), GenerationConfig(**SAMPLING, num_return_sequences=3))
    assert len({tuple(row) for row in three}) == 3
    assert run(tiny, prepare([5, 6]), GenerationConfig(**SAMPLING)) == three[:1]
    assert run(tiny, prepare([[5, 6], [5, 6]]), GenerationConfig(**SAMPLING)) == three[:2]


def test_sampling_from_the_best_token_is_greedy(tiny):
    inputs = prepare(PROMPTS)
    greedy = run(tiny, inputs, GenerationConfig(8))
    assert run(tiny, inputs, GenerationConfig(8, do_sample=True, top_k=1)) == greedy
    assert run(tiny, inputs, GenerationConfig(8, do_sample=True, top_p=1e-6)) == greedy


def test_strong_penalty_forbids_repetition(tiny):
    inputs = prepare([375, 79])
    plain = run(tiny, inputs, GenerationConfig(24))[0]
    penalized = run(tiny, inputs, GenerationConfig(24, repetition_penalty=1e6))[0]
    assert len(set(plain)) < len(plain)
    assert len(set(penalized)) == len(penalized)


def test_beam_search_cannot_be_streamed():
    with pytest.raises(ValueError, match=r"num_beams = 2: beam search cannot be streamed"):
        next(run(Scripted([[1]]), prepare([1]), GenerationConfig(1, num_beams=2), stream))


@pytest.mark.parametrize("beams", [1, 2])
def test_ids_outside_the_vocabulary_of_the_network(beams):
    decoder, inputs = Scripted([[1]] * beams), prepare([1])
    with pytest.raises(ValueError, match=r"eos_token_id = 10: .* ids 0..9"):
        run(decoder, inputs, GenerationConfig(1, num_beams=beams, eos_token_id=[2, 10]))
    with pytest.raises(ValueError, match="pad_token_id = 10"):
        run(decoder, inputs, GenerationConfig(1, num_beams=beams, pad_token_id=10))


class Broken(Scripted):
    """Breaks the scores of one row of the second prompt after the first token."""

    def scores(self, rows):
        scores = super().scores(rows)
        if self.fed and rows[-1].number == 1:
            scores[-1, 3] = np.inf
        return scores


@pytest.mark.parametrize("beams", [1, 2])
def test_broken_scores_are_an_error_or_replaced_as_in_the_original(beams):
    """The original replaces the scores of one prompt, or of its beams; other prompts of a batch do not change."""
    script, inputs = [[4, 4, 4]] * 2, prepare([[1], [2]])
    with pytest.raises(FloatingPointError, match=r"generated token 1: .* row [13] .* replace_invalid_scores"):
        run(Broken(script), inputs, GenerationConfig(3, num_beams=beams))
    config = GenerationConfig(2, num_beams=beams, replace_invalid_scores=True)
    assert run(Broken(script), inputs, config) == [[1, 4, 4], [2, 4, 5]]


ROWS = [
    {"max_new_tokens": 6},
    {"max_new_tokens": 8, "repetition_penalty": 1.4, "eos_token_id": [7, 11]},
    {**SAMPLING, "temperature": 0.7, "top_k": 30, "num_return_sequences": 2},
    {**SAMPLING, "seed": 8, "repetition_penalty": 1.2, "max_length": 5},
]


def test_each_row_by_its_own_options(tiny):
    """Greedy and sampled rows in one batch; two of them continue the same prompt with different seeds."""
    prompts, configs = [*PROMPTS[:3], PROMPTS[2], PROMPTS[3]], [GenerationConfig(**row) for row in ROWS]
    configs.insert(3, GenerationConfig(**{**SAMPLING, "seed": 9}))
    alone = [run(tiny, prepare(prompt), one) for prompt, one in zip(prompts, configs)]
    inputs = prepare(prompts)
    assert run(tiny, inputs, configs) == [*chain(*alone)]
    assert run(tiny, inputs[::-1], configs[::-1]) == [*chain(*alone[::-1])]
    assert alone[2][0] != alone[3][0]
    assert len(alone[4][0]) == 5
    steps = np.stack(list(run(tiny, inputs, configs, stream)), 1).tolist()
    starts = [len(prompt) for prompt, one in zip(prompts, alone) for _ in one]
    for row, sequence, start in zip(steps, chain(*alone), starts):
        assert row == sequence[start:] + [0] * (len(row) - len(sequence) + start)


def test_end_and_padding_ids_of_each_row():
    decoder = Scripted([[4, 9, 1], [4, 9, 1], [9, 1, 1]])
    configs = [
        GenerationConfig(3, eos_token_id=9, pad_token_id=6),
        GenerationConfig(3, eos_token_id=8),
        GenerationConfig(2, pad_token_id=7),
    ]
    steps = run(decoder, prepare([[1], [2], [3]]), configs, stream)
    assert np.stack(list(steps), 1).tolist() == [[4, 9, 6], [4, 9, 1], [9, 1, 7]]


def test_beams_beside_greedy_and_sampled_rows(tiny):
    options = [{"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}, {"max_new_tokens": 5}, SAMPLING]
    configs = [GenerationConfig(**one) for one in options]
    alone = [run(tiny, prepare(prompt), config) for prompt, config in zip(PROMPTS, configs)]
    assert run(tiny, prepare(PROMPTS[:3]), configs) == [*chain(*alone)]


@pytest.mark.parametrize("slots", [3, 4, 7])
def test_prompts_join_when_others_leave(tiny, monkeypatch, slots):
    """With fewer slots than rows each prompt gets what it gets alone, and no slot is idle while one fits."""
    prompts = [[*PROMPTS[index % 4], index + 1] for index in range(9)]
    configs = [GenerationConfig(**{**ROWS[index % 3], "max_new_tokens": 3 + 5 * (index % 2)}) for index in range(9)]
    configs[4] = GenerationConfig(6, num_beams=3)
    alone = [run(tiny, prepare(prompt), config) for prompt, config in zip(prompts, configs)]
    monkeypatch.setattr(tiny, "slots", slots)
    monkeypatch.setattr(tiny, "fed", [])
    assert run(tiny, prepare(prompts), configs) == [*chain(*alone)]
    assert max(map(len, tiny.fed)) <= slots


def test_answers_come_as_they_end():
    script = [[4, 4, 4, 9], [5, 9], [6, 6, 9], [7, 9]]
    decoder = Scripted(script)
    decoder.slots = 2
    prompts, config = prepare([[1], [2], [3], [4]], vocab_size=10), GenerationConfig(6, eos_token_id=9)

    def scores(rows):  # prompts are numbered by their first id: they join one by one
        tokens = [script[row.ids[0] - 1][len(row.ids) - row.prompt_length] for row in rows]
        return np.eye(10, dtype=np.float32)[tokens] * 50

    decoder.scores = scores
    found = list(answers(decoder, prompts, [config] * 4))
    assert found == [(1, [[5, 9]]), (0, [[4, 4, 4, 9]]), (2, [[6, 6, 9]]), (3, [[7, 9]])]
    assert decoder.fed == [[4, 5], [4, 6], [4, 6], [7]]
    assert not decoder.rows


def test_a_prompt_that_needs_more_slots_than_there_are():
    decoder = Scripted([[1]])
    decoder.slots = 2
    with pytest.raises(ValueError, match="a prompt needs 3 slots for its beams or sequences, the decoder has 2"):
        run(decoder, prepare([1]), GenerationConfig(2, num_beams=3))


def test_an_abandoned_stream_frees_its_slots(tiny):
    steps = run(tiny, prepare(PROMPTS), GenerationConfig(8), stream)
    next(steps)
    next(steps)
    assert len(tiny.rows) == 4
    steps.close()
    assert not tiny.rows
