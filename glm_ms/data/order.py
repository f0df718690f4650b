"""The order in which an epoch visits its rows: a function of seed and epoch, so a run can be resumed."""

from __future__ import annotations

import numpy as np


def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Row indices in the order of one epoch.

    Args:
        num_rows: rows of the data set.
        seed, epoch: not negative; every pair gives its own order, the same on every machine.
        shuffle: 0..num_rows-1 when false.

    Returns:
        int64 [num_rows], a permutation.

    Raises:
        ValueError: a negative argument.
    """
    for name, value in (("num_rows", num_rows), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} = {value}: must not be negative")
    if not shuffle:
        return np.arange(num_rows, dtype=np.int64)
    # NumPy keeps the raw stream of a bit generator across versions, but not what `permutation` makes of it.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(raw, kind="stable").astype(np.int64)
