"""Prompts of every accepted form lose their padding; everything else is a named error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from glm_ms.generation.inputs import prepare_prompts


class Tensor:
    """Stands for tensors of MindSpore: nothing but `asnumpy`."""

    def __init__(self, values):
        self.values = np.array(values)

    def asnumpy(self):
        return self.values


def prepare(*args, vocab_size=100, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prepare_prompts(*args, vocab_size=vocab_size, **kwargs)


def as_lists(prompts):
    """(ids, positions) of each prompt."""
    assert all(array.dtype == np.int32 for prompt in prompts for array in (prompt.ids, prompt.positions))
    return [(prompt.ids.tolist(), prompt.positions.tolist()) for prompt in prompts]


@pytest.mark.parametrize(
    "form",
    [
        [5, 6, 7],
        (5, 6, 7),
        [[5, 6, 7]],
        np.array([5, 6, 7]),
        np.array([[5, 6, 7]], np.uint8),
        [np.int64(5), np.int64(6), np.int64(7)],
        [np.array([5, 6, 7])],
        Tensor([5, 6, 7]),
        Tensor([[5, 6, 7]]),
        [Tensor([5, 6, 7])],
    ],
)
def test_one_prompt_in_every_form(form):
    assert as_lists(prepare(form)) == [([5, 6, 7], [0, 1, 2])]


def test_prompts_of_different_lengths():
    found = as_lists(prepare([[5, 6, 7], [8], [1, 2]], pad_token_id=3))
    assert found == [([5, 6, 7], [0, 1, 2]), ([8], [0]), ([1, 2], [0, 1])]


@pytest.mark.parametrize("name", ["glm2_tiny", "glm3_tiny", "glm3_32k_tiny"])
def test_golden_batch(golden, name):
    data = np.load(golden / "models" / name / "golden.npz")
    prompts = prepare(data["input_ids"], data["attention_mask"], vocab_size=512)
    for row, prompt in enumerate(prompts):
        real = data["attention_mask"][row] == 1
        np.testing.assert_array_equal(prompt.ids, data["input_ids"][row, real])
        np.testing.assert_array_equal(prompt.positions, data["position_ids"][row, real])


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([[0, 0, 5, 6], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ([[5, 6, 0, 0], [1, 2, 3, 4]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ([[9, 5, 9, 6], [1, 2, 3, 4]], [[0, 1, 0, 1], [1, 1, 1, 1]]),
        ([[5, 6], [1, 2, 3, 4]], None),
        ([[5, 6, 9], [1, 2, 3, 4]], [[True, True, False], [True] * 4]),
        (np.array([[5, 6, 9, 9], [1, 2, 3, 4]]), np.array([[1.0, 1, 0, 0], [1, 1, 1, 1]])),
    ],
)
def test_padding_anywhere_gives_the_same_prompts(ids, mask):
    assert as_lists(prepare(ids, mask)) == [([5, 6], [0, 1]), ([1, 2, 3, 4], [0, 1, 2, 3])]


def test_columns_of_padding_only():
    found = as_lists(prepare([[0, 0, 5], [0, 6, 7]], [[0, 0, 1], [0, 1, 1]]))
    assert found == [([5], [0]), ([6, 7], [0, 1])]


def test_given_positions_stay_with_their_tokens():
    found = as_lists(prepare([[5, 6, 0], [1, 2, 3]], [[1, 1, 0], [1, 1, 1]], [[40, 41, 7], [3, 4, 5]]))
    assert found == [([5, 6], [40, 41]), ([1, 2, 3], [3, 4, 5])]


def test_the_arguments_are_not_changed():
    ids, mask = np.array([[5, 0]]), np.array([[1, 0]])
    prepare(ids, mask)
    assert (ids.tolist(), mask.tolist()) == ([[5, 0]], [[1, 0]])


@pytest.mark.parametrize("ids", [[[0, 5], [6, 7]], np.array([[6, 7], [5, 0]])])
def test_padding_without_a_mask_is_a_visible_warning(ids):
    with pytest.warns(UserWarning, match="begins or ends with the padding id 0 .* attention_mask") as caught:
        prompts = prepare_prompts(ids, vocab_size=100)
    assert caught[0].filename == __file__
    assert [len(prompt.ids) for prompt in prompts] == [2, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "input_ids: empty"),
        (np.zeros((0, 3), int), "input_ids: empty"),
        ([[5], []], "row 1 is empty"),
        ("hello", "expected one sequence .* the tokenizer returns"),
        ({"input_ids": [5]}, "expected one sequence .* the tokenizer returns"),
        (None, "expected one sequence"),
        (5, "expected one sequence"),
        (["5"], "row 0: expected integers, found <U1"),
        ([[5.0, 6.0]], "row 0: expected integers, found float64"),
        (np.array([5.0]), "row 0: expected integers, found float64"),
        ([True, False], "row 0: expected integers, found bool"),
        ([5, None], "row 0: expected integers, found object"),
        ([[[5]]], r"row 0: expected a sequence of integers, found shape \(1, 1\)"),
        ([[[5], [6, 7]]], "row 0 is not a sequence of integers"),
        ([[5], 6], r"row 1: expected a sequence of integers, found shape \(\)"),
        (np.zeros((1, 1, 1), int), r"found shape \(1, 1, 1\)"),
        ([[5, 6], [7, 100]], r"row 1, place 1: id 100 is outside the vocabulary 0..99"),
        ([[5, -1]], r"row 0, place 1: id -1 is outside"),
        ([[2**40]], r"row 0, place 0: id 1099511627776 is outside"),
    ],
)
def test_unusable_prompts_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        prepare(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": [[1, 1]]}, "attention_mask: 1 rows for 2 rows"),
        ({"attention_mask": [[1, 1], [1, 1]]}, "attention_mask: row 1 has length 2, input_ids has 3"),
        ({"attention_mask": [[1, 2], [1, 1, 1]]}, "attention_mask: row 0 contains 2: expected only 0 and 1"),
        ({"attention_mask": [[1, 0.5], [1, 1, 1]]}, "attention_mask: row 0 contains 0.5"),
        ({"attention_mask": [["1", "1"], [1, 1, 1]]}, "attention_mask: row 0: expected 0 and 1, found <U1"),
        ({"attention_mask": [[0, 0], [1, 1, 1]]}, "attention_mask: row 0 hides every token"),
        ({"position_ids": [[0, 1]]}, "position_ids: 1 rows for 2 rows"),
        ({"position_ids": [[0, 1], [0.0, 1.0, 2.0]]}, "position_ids: row 1: expected integers"),
        ({"position_ids": [[0, -1], [0, 1, 2]]}, "position_ids: row 0 runs from -1 to 0"),
        ({"position_ids": [[0, 2**31], [0, 1, 2]]}, "position_ids: row 0 runs from 0 to 2147483648"),
    ],
)
def test_unusable_masks_and_positions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare([[5, 6], [7, 8, 9]], **arguments)
