"""The order of an epoch: fixed for ever, since a resumed run depends on it."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms.data.datasets import epoch_order


def test_is_a_permutation_of_its_own():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in (0, 1) for epoch in range(5)]
    assert len(set(orders)) == 10
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert tuple(epoch_order(100, 1, 4)) == orders[-1]


def test_never_changes():
    """Written down once; another machine or NumPy that orders otherwise would break resumed runs."""
    assert epoch_order(10, seed=42, epoch=0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert epoch_order(10, seed=42, epoch=3).tolist() == [0, 8, 6, 5, 1, 3, 7, 4, 2, 9]


def test_without_shuffle_and_without_rows():
    assert epoch_order(5, 1, 2, shuffle=False).tolist() == [0, 1, 2, 3, 4]
    assert epoch_order(0, 1, 2).shape == (0,)
    assert epoch_order(3, 1, 2).dtype == epoch_order(3, 1, 2, shuffle=False).dtype == np.int64


def test_is_even():
    """Every row comes first about equally often."""
    firsts = np.bincount([epoch_order(4, 7, epoch)[0] for epoch in range(2000)], minlength=4)
    assert firsts.min() > 420
    assert firsts.max() < 580


def test_negative_arguments():
    for arguments in ((-1, 0, 0), (1, -1, 0), (1, 0, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            epoch_order(*arguments)
