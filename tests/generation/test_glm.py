"""`GLMForCausalLM` with the real network: golden sequences, inputs of every kind, errors."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import Tensor
from reference import CASES, golden_model, golden_numbers
from tolerances import LOGITS

from glm_ms import GLMConfig, GLMForCausalLM

PROMPT = 24  # columns of the golden prompts
MODEL_OF_BEAMS = "glm2_tiny"


def prompts(case: str) -> tuple[np.ndarray, np.ndarray]:
    numbers = golden_numbers(case)
    return numbers["input_ids"], numbers["attention_mask"]


def expected_rows(sequences: np.ndarray, mask: np.ndarray, eos: int | None = None) -> list[list[int]]:
    """Golden rows as `generate` returns them: without padding, cut after the end token."""
    rows = []
    for row, keep in zip(sequences, mask):
        new = row[PROMPT:].tolist()
        if eos is not None and eos in new:
            new = new[: new.index(eos) + 1]
        rows.append([*row[:PROMPT][keep == 1].tolist(), *new])
    return rows


# The others differ in the network alone, whose logits tests/model/test_golden.py compares.
@pytest.mark.parametrize("case", slow_unless(["glm2_tiny", "glm3_tiny"], CASES))
def test_greedy(case: str) -> None:
    numbers = golden_numbers(case)
    ids, mask = prompts(case)
    found = golden_model(case).generate(ids, mask, max_new_tokens=16, eos_token_id=[])
    assert found == expected_rows(numbers["greedy_sequences"], mask)
    eos = int(numbers["greedy_eos_id"])
    found = golden_model(case).generate(ids, mask, max_new_tokens=16, eos_token_id=eos)
    assert found == expected_rows(numbers["greedy_eos_sequences"], mask, eos)


def test_greedy_logits_of_the_first_steps() -> None:
    numbers = golden_numbers("glm3_tiny")
    model = golden_model("glm3_tiny")
    sequences = numbers["greedy_sequences"]
    mask = np.concatenate([numbers["attention_mask"], np.ones((2, 16), np.int64)], axis=1)
    logits = model(sequences, mask).asnumpy()
    for step, expected in enumerate(numbers["greedy_logits"]):
        np.testing.assert_allclose(logits[:, PROMPT - 1 + step], expected, **LOGITS)


def beam_cases() -> list[dict]:
    path = Path(__file__).resolve().parent.parent / "golden" / "sampling.json"
    return json.loads(path.read_text(encoding="utf-8"))["beam_search"]


@pytest.mark.parametrize("index", range(len(beam_cases())))
def test_beam_search(index: int) -> None:
    case = beam_cases()[index]
    ids, mask = prompts(MODEL_OF_BEAMS)
    if case["input"] == "row0_alone":
        ids, mask = ids[:1], mask[:1]
    options = {k: v for k, v in case["params"].items() if k != "pad_token_id"}
    found = golden_model(MODEL_OF_BEAMS).generate(ids, mask, **options)
    mask = np.repeat(mask, options["num_return_sequences"], axis=0)
    expected = expected_rows(np.array(case["sequences"]), mask, options["eos_token_id"])
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        pytest.param({"repetition_penalty": 1.3}, marks=pytest.mark.slow),
    ],
)
def test_rows_of_different_lengths_as_alone(options: dict) -> None:
    model = golden_model("glm3_tiny")
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 500, n).tolist() for n in (3, 17, 9)]
    together = model.generate(rows, max_new_tokens=8, **options)
    alone = [model.generate(row, max_new_tokens=8, **options)[0] for row in rows]
    assert together == alone
    assert all(found[: len(row)] == row for row, found in zip(rows, together))


def test_seed_decides_the_sample() -> None:
    model = golden_model("glm2_tiny")
    options = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3}
    first = model.generate([7, 8, 9], seed=1, **options)
    assert first == model.generate([7, 8, 9], seed=1, **options)
    assert first != model.generate([7, 8, 9], seed=2, **options)
    assert len({tuple(row) for row in first}) > 1


def test_stream_gives_what_generate_gives() -> None:
    model = golden_model("glm3_tiny")
    rows = [[5, 6, 7, 8], [9, 10]]
    steps = list(model.stream(rows, max_new_tokens=6))
    assert all(step.shape == (2,) for step in steps)
    streamed = np.stack(steps, axis=1).tolist()
    assert [row + new for row, new in zip(rows, streamed)] == model.generate(rows, max_new_tokens=6)


def test_streams_at_the_same_time_do_not_mix() -> None:
    model = golden_model("glm3_tiny")
    pair = zip(model.stream([5, 6, 7], max_new_tokens=6), model.stream([100, 200], max_new_tokens=6))
    first, second = (np.concatenate(tokens).tolist() for tokens in zip(*pair))
    assert [5, 6, 7, *first] == model.generate([5, 6, 7], max_new_tokens=6)[0]
    assert [100, 200, *second] == model.generate([100, 200], max_new_tokens=6)[0]


def test_eos_of_the_config_is_the_default() -> None:
    numbers = golden_numbers("glm2_tiny")
    ids, mask = prompts("glm2_tiny")
    model = golden_model("glm2_tiny")
    eos = int(numbers["greedy_eos_id"])
    config = GLMConfig(**{**model.config.to_dict(), "eos_token_id": eos})
    parameters = {name: p.asnumpy() for name, p in model.parameters().items()}
    other = GLMForCausalLM.from_parameters(config, parameters.items())
    assert other.generate(ids, mask, max_new_tokens=16) == model.generate(
        ids, mask, max_new_tokens=16, eos_token_id=eos
    )


def test_longer_calls_in_the_same_capacity_see_nothing_of_earlier_ones() -> None:
    model = golden_model("glm2_mha")
    rng = np.random.default_rng(1)
    short = rng.integers(5, 500, 4).tolist()
    first = model.generate(short, max_new_tokens=5)
    model.generate(rng.integers(5, 500, 50).tolist(), max_new_tokens=10)
    assert model.generate(short, max_new_tokens=5) == first


def test_inputs_of_every_kind() -> None:
    model = golden_model("glm2_tiny")
    ids = [[11, 12, 13], [14, 15, 16]]
    expected = model(ids).asnumpy()
    for same in (np.array(ids), np.array(ids, np.int32), Tensor(np.array(ids), ms.int64)):
        np.testing.assert_array_equal(model(same).asnumpy(), expected)
        assert model.generate(same, max_new_tokens=2) == model.generate(ids, max_new_tokens=2)
    np.testing.assert_allclose(model(ids[0]).asnumpy(), expected[:1], **LOGITS)


@pytest.mark.parametrize("options", slow_unless([{}], [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}]))
def test_max_length_lets_a_short_prompt_go_on_to_the_end_of_the_table(options: dict) -> None:
    model = golden_model("glm2_tiny")
    assert model.config.seq_length == 64
    rows = [[7] * 60, [8, 9] * 26]
    got = model.generate(rows, max_new_tokens=64, max_length=64, eos_token_id=[], **options)
    assert [len(row) for row in got] == [64, 64]
    for row, alone in zip(rows, got):
        assert model.generate(row, max_new_tokens=64 - len(row), eos_token_id=[], **options) == [alone]


def test_works_in_pynative_mode_and_leaves_it_alone() -> None:
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        model = golden_model("glm2_tiny")
        assert model([[5, 6]]).shape == (1, 2, 512)
        assert len(model.generate([5, 6], max_new_tokens=2)[0]) == 4
        assert ms.get_context("mode") == ms.PYNATIVE_MODE
    finally:
        ms.set_context(mode=mode)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2], [3]]}, "different lengths"),
        ({"input_ids": [[1.5, 2]]}, "expected integers"),
        ({"input_ids": [[1, 512]]}, "input_ids: row 0, place 1: id 512 is outside the vocabulary 0..511"),
        ({"input_ids": [[1, -1]]}, "input_ids: row 0, place 1: id -1 is outside"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[[1]]]}, "found shape"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            "attention_mask: row 0 has length 1, input_ids has 2",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 2]]},
            "attention_mask: row 0 contains 2: expected only 0 and 1",
        ),
        ({"input_ids": [[1, 2]], "position_ids": [[0, 64]]}, r"position_ids: 64 .*seq_length"),
        ({"input_ids": [list(range(65))]}, r"seq_length"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "no label"),
        ({"input_ids": [[1, 2]], "labels": [[1, -5]]}, "labels: -5"),
    ],
)
def test_bad_calls(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        golden_model("glm2_tiny")(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [1] * 60, "max_new_tokens": 6}, "seq_length = 64"),
        ({"input_ids": [1] * 60, "max_new_tokens": 6, "max_length": 66}, "seq_length = 64"),
        ({"input_ids": [1] * 60, "max_new_tokens": 6, "max_length": 60}, "prompt 0 has 60 tokens"),
        ({"input_ids": [1, 2], "max_new_tokens": 2, "top_q": 0.5}, "did you mean"),
        ({"input_ids": [1, 600], "max_new_tokens": 2}, "outside the vocabulary"),
        ({"input_ids": [1, 2], "max_new_tokens": 0}, "max_new_tokens"),
        ({"input_ids": [1, 2], "max_new_tokens": 2, "eos_token_id": 700}, "eos_token_id"),
    ],
)
def test_bad_generation(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        golden_model("glm2_tiny").generate(**arguments)


def test_streaming_beams_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="beam"):
        golden_model("glm2_tiny").stream([1, 2], max_new_tokens=2, num_beams=2)


def test_wrong_parameters_are_named() -> None:
    model = golden_model("glm2_tiny")
    values = {name: p.asnumpy() for name, p in model.parameters().items()}
    name = "transformer.output_layer.weight"
    for change, message in (
        ({"extra": values[name]}, "'extra' is unknown"),
        ({name: values[name][:-1]}, "output_layer.weight: shape"),
    ):
        with pytest.raises(ValueError, match=message):
            GLMForCausalLM.from_parameters(model.config, {**values, **change}.items())
    del values[name]
    with pytest.raises(ValueError, match="1 parameters are missing: transformer"):
        GLMForCausalLM.from_parameters(model.config, values.items())
