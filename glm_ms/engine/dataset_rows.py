"""Rows of a MindSpore data set that a caller hands to `train`, in place of the file of `train_dataset`."""

from __future__ import annotations

import hashlib

import numpy as np
from mindspore import dataset as ds

from glm_ms.data.rows import Row
from glm_ms.engine.batches import COLUMNS
from glm_ms.storage.errors import DataError


class DatasetRows:
    """The rows of a MindSpore data set, in memory, in the order in which it yields them.

    Args:
        dataset: batches [B, S] or rows [S] of integers: `input_ids` and `labels` (-100 where a token carries no loss),
            and optionally `attention_mask` (default: nothing is padding) and `position_ids` (default: counted from the
            mask).

    Attributes:
        seq_length: ids in a row.
        batch_size: rows of its batches.
        sha256: of all rows.

    Raises:
        DataError: a column is missing, or rows are not integers of one length.
    """

    def __init__(self, dataset: ds.Dataset) -> None:
        names = dataset.get_col_names()
        missing = [name for name in ("input_ids", "labels") if name not in names]
        if missing:
            raise DataError(f"train_dataset: has no column {missing[0]}; its columns are {', '.join(names)}")
        found = [name for name in COLUMNS if name in names]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for item in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
            for name in found:
                parts[name].append(np.atleast_2d(item[name]))
        if not parts["input_ids"]:
            raise DataError("train_dataset: has no rows")
        self.batch_size = len(parts["input_ids"][0])
        self._columns = {name: _joined(name, arrays) for name, arrays in parts.items()}
        self._fill_in()
        self.seq_length = self._columns["input_ids"].shape[1]
        digest = hashlib.sha256()
        for name in COLUMNS:
            digest.update(self._columns[name].tobytes())
        self.sha256 = digest.hexdigest()

    def _fill_in(self) -> None:
        columns, shape = self._columns, self._columns["input_ids"].shape
        columns.setdefault("attention_mask", np.ones(shape, np.int32))
        mask = columns["attention_mask"]
        columns.setdefault("position_ids", (np.maximum(np.cumsum(mask, 1) - 1, 0) * mask).astype(np.int32))
        for name, values in columns.items():
            if values.shape != shape:
                raise DataError(f"train_dataset: {name} has shape {values.shape}, input_ids {shape}")

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `attention_mask`, `position_ids`: int32 [seq_length] each."""
        return {name: self._columns[name][index] for name in COLUMNS}

    def describe(self) -> str:
        """One line for the user."""
        return f"train_dataset: {len(self)} rows of {self.seq_length} tokens, read into memory"


def _joined(name: str, arrays: list[np.ndarray]) -> np.ndarray:
    lengths = sorted({array.shape[-1] for array in arrays})
    if len(lengths) > 1 or arrays[0].ndim != 2 or not np.issubdtype(arrays[0].dtype, np.integer):
        raise DataError(
            f"train_dataset: {name}: expected rows of integers of one length, found {arrays[0].dtype} of {lengths}"
        )
    return np.concatenate(arrays).astype(np.int32)
