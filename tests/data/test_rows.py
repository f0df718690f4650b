"""Rows cut to what their loss depends on, and batches of them."""

from __future__ import annotations

import numpy as np

from glm_ms.data.rows import IGNORED, Row, equally_long, left_padded_row, right_padded_row, shortened

IDS, LABELS = [5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, IGNORED]


def as_lists(row: Row) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in row.items()}


def test_a_row_ends_at_its_last_label() -> None:
    assert as_lists(shortened(right_padded_row(IDS, LABELS, 12, 3))) == {
        "input_ids": [5, 6, 7, 8], "labels": LABELS[:4], "attention_mask": [1] * 4, "position_ids": [0, 1, 2, 3],
    }  # fmt: skip


def test_padding_on_the_left_goes_so_that_places_do_not_depend_on_it() -> None:
    rows = [shortened(left_padded_row(IDS, LABELS, length, 3)) for length in (5, 12)]
    assert as_lists(rows[0]) == as_lists(rows[1]) == as_lists(shortened(right_padded_row(IDS, LABELS, 5, 3)))


def test_a_row_whose_labels_reach_its_end_stays_whole() -> None:
    padding_is_learnt = right_padded_row(IDS, LABELS, 9, 3, pad_label=3)
    assert as_lists(shortened(padding_is_learnt)) == as_lists(padding_is_learnt)


def test_a_row_without_labels_keeps_two_tokens() -> None:
    for layout in (left_padded_row, right_padded_row):
        row = shortened(layout(IDS, [IGNORED] * 5, 12, 3))
        assert {name: len(values) for name, values in row.items()} == dict.fromkeys(row, 2)


def test_a_row_stays_whole_if_padding_predicts_a_label() -> None:
    """Such a token sees the whole row, later tokens too."""
    row = left_padded_row(IDS, [4, *LABELS[1:]], 12, 3)
    assert as_lists(shortened(row)) == as_lists(row)
    hole = right_padded_row(IDS, LABELS, 12, 3)
    hole["attention_mask"][2] = 0
    assert as_lists(shortened(hole)) == as_lists(hole)


def test_rows_of_a_batch_get_the_length_of_the_longest() -> None:
    parts = [np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32)]
    filled = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
    for name, value in filled.items():
        columns = equally_long(name, parts)
        assert [column.tolist() for column in columns] == [[1, 2, value], [3, 4, 5]]
        assert all(column.dtype == np.int32 for column in columns)
