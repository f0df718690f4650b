"""The plan of a run: which rows each step takes, and the data set that delivers them."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest

from glm_ms.data.datasets import epoch_order
from glm_ms.storage.errors import DataError

SEQ_LENGTH = 6
COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


def make_plan(**changes: object):
    from glm_ms.engine.batches import TrainingPlan

    values = {
        "num_rows": 23, "batch_size": 2, "accumulation_steps": 2, "num_ranks": 1, "epochs": 3,
        "max_steps": None, "seed": 5, "shuffle": True, "drop_remainder": True,
    }  # fmt: skip
    assert set(changes) <= set(values)
    return TrainingPlan(**{**values, **changes})


def rows_of_run(plan) -> np.ndarray:
    return np.concatenate([plan.rows_of(step) for step in range(plan.total_steps)])


class NumberedRows:
    """Row i holds i everywhere."""

    seq_length = SEQ_LENGTH

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: np.full(SEQ_LENGTH, index, np.int32) for name in COLUMNS}


def delivered(plan, start_step: int = 0, rank: int = 0, num_workers: int = 1) -> list[list[np.ndarray]]:
    return [batch[:-1] for batch in delivered_with_seeds(plan, start_step, rank, num_workers)]


def delivered_with_seeds(plan, start_step: int = 0, rank: int = 0, num_workers: int = 1) -> list[list[np.ndarray]]:
    from glm_ms.engine.batches import training_batches

    data = training_batches(NumberedRows(), plan, start_step, rank, num_workers)
    assert data.get_col_names() == [*COLUMNS, "dropout_seeds"]
    assert data.get_dataset_size() == (plan.total_steps - start_step) * plan.accumulation_steps
    return list(data.create_tuple_iterator(num_epochs=1, output_numpy=True))


def test_steps() -> None:
    plan = make_plan()
    assert (plan.rows_per_step, plan.steps_per_epoch, plan.total_steps) == (4, 5, 15)
    assert make_plan(drop_remainder=False).steps_per_epoch == 6
    assert make_plan(num_rows=24, drop_remainder=False).steps_per_epoch == 6
    assert make_plan(max_steps=7).total_steps == 7
    assert make_plan(max_steps=70).total_steps == 15


def test_rows_follow_the_order_of_each_epoch() -> None:
    plan = make_plan()
    for epoch in range(3):
        rows = np.concatenate([plan.rows_of(epoch * 5 + place) for place in range(5)])
        np.testing.assert_array_equal(rows, epoch_order(23, 5, epoch)[:20])
        assert len(set(rows.tolist())) == 20
    assert not np.array_equal(plan.rows_of(0), plan.rows_of(5))
    assert not np.array_equal(plan.rows_of(0), make_plan(seed=6).rows_of(0))
    np.testing.assert_array_equal(make_plan(shuffle=False).rows_of(6), [4, 5, 6, 7])


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine import batches

    made: list[int] = []
    monkeypatch.setattr(batches, "epoch_order", lambda *given: made.append(given[2]) or epoch_order(*given))
    plan = make_plan(seed=71)
    rows_of_run(plan)
    assert made == [0, 1, 2]


def test_every_row_once_without_drop_remainder() -> None:
    rows = rows_of_run(make_plan(drop_remainder=False, epochs=2))
    counts = Counter(rows.tolist())
    assert counts.pop(-1) == 2  # 6 steps of 4 rows for 23 rows, twice
    assert counts == dict.fromkeys(range(23), 2)
    assert Counter(rows_of_run(make_plan(num_rows=3, drop_remainder=False, epochs=1)).tolist())[-1] == 1


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_ranks_share_the_rows_of_a_step(drop_remainder: bool) -> None:
    plan = make_plan(num_ranks=2, drop_remainder=drop_remainder)
    parts = [np.stack(delivered(plan, rank=rank))[:, 1, :, 0] for rank in range(2)]  # labels, first place
    assert parts[0].shape == (plan.total_steps * 2, 2)
    for step in range(plan.total_steps):
        shares = [part[2 * step : 2 * step + 2].ravel() for part in parts]
        np.testing.assert_array_equal(
            np.concatenate(shares), np.where(plan.rows_of(step) < 0, -100, plan.rows_of(step))
        )
        real = [set(share[share >= 0].tolist()) for share in shares]
        assert not real[0] & real[1]


# MindSpore takes no more workers than the machine has cores.
@pytest.mark.parametrize("num_workers", sorted({1, min(3, os.cpu_count() or 1)}))
def test_batches_in_order_from_any_step(num_workers: int) -> None:
    plan = make_plan()
    whole = delivered(plan, num_workers=num_workers)
    assert all(len(batch) == 4 and batch[0].shape == (2, SEQ_LENGTH) for batch in whole)
    assert all(column.dtype == np.int32 for column in whole[0])
    np.testing.assert_array_equal(np.stack(whole)[:, 0, :, 0].ravel(), rows_of_run(plan))
    for start in (1, 4, 5, 14):
        rest = delivered(plan, start, num_workers=num_workers)
        np.testing.assert_array_equal(np.stack(rest), np.stack(whole[2 * start :]))


def test_filling_rows_carry_no_loss() -> None:
    last = np.stack(delivered(make_plan(epochs=1, drop_remainder=False, shuffle=False))[-1])
    np.testing.assert_array_equal(last[0], [[22] * SEQ_LENGTH, [0] * SEQ_LENGTH])  # input_ids
    np.testing.assert_array_equal(last[1], [[22] * SEQ_LENGTH, [-100] * SEQ_LENGTH])  # labels


def seeds_of(plan, start_step: int = 0, rank: int = 0) -> np.ndarray:
    """int32 [steps, rows of a rank]."""
    seeds = [batch[-1] for batch in delivered_with_seeds(plan, start_step, rank)]
    assert all(each.dtype == np.int32 and each.shape == (plan.batch_size,) for each in seeds)
    return np.stack(seeds).reshape(-1, plan.batch_size * plan.accumulation_steps)


def test_dropout_seeds_belong_to_the_place_in_the_step() -> None:
    """So that a resumed run, another accumulation and more ranks draw the same masks."""
    whole = seeds_of(make_plan())
    assert len(set(whole.ravel().tolist())) == whole.size  # 15 steps of 4 rows
    np.testing.assert_array_equal(seeds_of(make_plan(), start_step=4), whole[4:])
    np.testing.assert_array_equal(seeds_of(make_plan(batch_size=4, accumulation_steps=1)), whole)
    two_ranks = make_plan(batch_size=1, num_ranks=2)
    np.testing.assert_array_equal(np.hstack([seeds_of(two_ranks, rank=rank) for rank in range(2)]), whole)
    assert not np.isin(seeds_of(make_plan(seed=6)), whole).any()


def test_dropout_seeds_are_well_mixed() -> None:
    """Every bit of seeds of neighbouring steps and places is set half of the time; 5 standard deviations."""
    plan = make_plan()
    seeds = np.array([plan.dropout_seed(step, place) for step in range(100) for place in range(100)], np.int32)
    bits = np.unpackbits(seeds.view(np.uint8)).reshape(-1, 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(bits))
    flips = bits[1:] ^ bits[:-1]
    assert np.abs(flips.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(flips))


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match=r"3 records do not fill one step of 4 rows .*batch_size 2 x") as info:
        make_plan(num_rows=3)
    assert "gradient_accumulation_steps 2 x 1 ranks" in str(info.value)
    assert "train_dataset.drop_remainder: False" in str(info.value)
    assert make_plan(num_rows=4).total_steps == 3


@pytest.mark.parametrize("sizes", [{"epochs": 10**9}, {"batch_size": 10**9, "drop_remainder": False}])
def test_more_rows_than_memory_has(sizes: dict) -> None:
    with pytest.raises(
        DataError, match=r"the data pipeline lists at most 268,435,456 rows .*lower runner_config\.epochs"
    ):
        make_plan(**sizes)
    assert make_plan(epochs=10**9, max_steps=5).total_steps == 5


class RowsOfLengths(NumberedRows):
    """Row i has labels up to place i % 4 + 2."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = super().__getitem__(index)
        labels = np.where(np.arange(SEQ_LENGTH) <= index % 4 + 1, index, -100).astype(np.int32)
        return {**row, "labels": labels, "attention_mask": ONES}


ONES = np.ones(SEQ_LENGTH, np.int32)


def test_shortened_batches_have_the_length_of_their_longest_row() -> None:
    from glm_ms.engine.batches import training_batches

    plan = make_plan()
    data = training_batches(RowsOfLengths(), plan, shorten=True)
    batches = list(data.create_tuple_iterator(num_epochs=1, output_numpy=True))
    rows = rows_of_run(plan).reshape(-1, 2)
    assert [batch[0].shape[1] for batch in batches] == [max(i % 4 + 2 for i in pair) for pair in rows.tolist()]
    for pair, (ids, labels, mask, positions, seeds) in zip(rows.tolist(), batches):
        for place, index in enumerate(pair):
            length = index % 4 + 2
            assert mask[place].tolist() == [1] * length + [0] * (mask.shape[1] - length)
            assert labels[place].tolist() == [index] * length + [-100] * (mask.shape[1] - length)
            assert ids[place, :length].tolist() == positions[place, :length].tolist() == [index] * length
        assert seeds.shape == (2,)
        assert {one.dtype for one in (ids, labels, mask, positions, seeds)} == {np.dtype("i4")}
    np.testing.assert_array_equal([batch[-1] for batch in batches], [batch[-1] for batch in delivered_with_seeds(plan)])
