"""Training rows in the order of training, a function of seed and step: a run can resume at any step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from mindspore import dataset as ds

from glm_ms.data.datasets import epoch_order
from glm_ms.data.rows import IGNORED, Row, equally_long, shortened
from glm_ms.storage.errors import DataError

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
TRAINING_COLUMNS = (*COLUMNS, "dropout_seeds")
_MOST_ROWS = 2**28  # of a run; MindSpore's sampler makes one int64 tensor of them


class TrainingRows(Protocol):
    """Random access to training rows of one length."""

    @property
    def seq_length(self) -> int:
        """Tokens of every row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def describe(self) -> str:
        """One line for the user."""


class DatasetRows:
    """The rows of a MindSpore data set that a caller hands to `train`, in memory, in the order in which it yields them.

    Args:
        dataset: batches [B, S] or rows [S] of integers: `input_ids` and `labels` (-100 where a token carries no loss),
            and optionally `attention_mask` (default: nothing is padding) and `position_ids` (default: counted from the
            mask).

    `batch_size` is that of the data set, `sha256` that of all rows.

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
        self._columns = columns = {name: _joined(name, arrays) for name, arrays in parts.items()}
        shape = columns["input_ids"].shape
        columns.setdefault("attention_mask", np.ones(shape, np.int32))
        mask = columns["attention_mask"]
        columns.setdefault("position_ids", (np.maximum(np.cumsum(mask, 1) - 1, 0) * mask).astype(np.int32))
        for name, values in columns.items():
            if values.shape != shape:
                raise DataError(f"train_dataset: {name} has shape {values.shape}, input_ids {shape}")
        self.seq_length = shape[1]
        digest = hashlib.sha256()
        for name in COLUMNS:
            digest.update(columns[name].tobytes())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> Row:
        """int32 [seq_length] of each of COLUMNS."""
        return {name: self._columns[name][index] for name in COLUMNS}

    def describe(self) -> str:
        return f"train_dataset: {len(self)} rows of {self.seq_length} tokens, read into memory"


def _joined(name: str, arrays: list[np.ndarray]) -> np.ndarray:
    lengths = sorted({array.shape[-1] for array in arrays})
    if len(lengths) > 1 or arrays[0].ndim != 2 or not np.issubdtype(arrays[0].dtype, np.integer):
        raise DataError(
            f"train_dataset: {name}: expected rows of integers of one length, found {arrays[0].dtype} of {lengths}"
        )
    return np.concatenate(arrays).astype(np.int32)


@dataclass(frozen=True)
class TrainingPlan:
    """How many steps a run has and which rows each step takes.

    A step is one update: `accumulation_steps` micro batches of `batch_size` rows on each of `num_ranks` ranks.

    Attributes:
        num_rows: rows of the data set.
        max_steps: at most so many steps, None for all.
        seed, shuffle: order of each epoch, see `epoch_order`.
        drop_remainder: leave out rows of an epoch that do not fill a step; else fill it up with rows without loss.

    Raises:
        DataError: fewer rows than one step takes, with `drop_remainder`; more rows in the run than can be listed.
    """

    num_rows: int
    batch_size: int
    accumulation_steps: int
    num_ranks: int
    epochs: int
    max_steps: int | None
    seed: int
    shuffle: bool
    drop_remainder: bool

    def __post_init__(self) -> None:
        if self.drop_remainder and self.num_rows < self.rows_per_step:
            raise DataError(
                f"{self.num_rows} records do not fill one step of {self.rows_per_step} rows (runner_config."
                f"batch_size {self.batch_size} x gradient_accumulation_steps {self.accumulation_steps} x "
                f"{self.num_ranks} ranks); lower one of them or set train_dataset.drop_remainder: False"
            )
        rows = self.total_steps * self.rows_per_rank
        if rows > _MOST_ROWS:
            raise DataError(
                f"{self.total_steps:,} steps with {rows:,} rows on each rank: the data pipeline lists at most "
                f"{_MOST_ROWS:,} rows in memory; lower runner_config.epochs, max_steps or batch_size"
            )

    @property
    def rows_per_rank(self) -> int:
        """Of a step."""
        return self.batch_size * self.accumulation_steps

    @property
    def rows_per_step(self) -> int:
        """All ranks together."""
        return self.rows_per_rank * self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one pass over the rows."""
        filled_up = 0 if self.drop_remainder else self.rows_per_step - 1
        return (self.num_rows + filled_up) // self.rows_per_step

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows_of(self, step: int) -> np.ndarray:
        """Row indices of a step (from 0), int64 [rows_per_step]; -1 for a row without loss."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.num_rows, self.seed, epoch, self.shuffle)
        rows = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        return np.pad(rows, (0, self.rows_per_step - len(rows)), constant_values=-1)

    def dropout_seed(self, step: int, place: int) -> int:
        """Seed of the dropout masks of the row at `place` of a step (from 0), an int32.

        It depends only on the run's seed, the step and the place in the whole step, so that neither accumulation nor
        the number of ranks changes a mask, and a resumed run repeats it.
        """
        mixed = 0
        for value in (self.seed, step, place):
            mixed = _splitmix64(mixed ^ value)
        return (mixed >> 32) - 2**31


@lru_cache(maxsize=2)  # the pipeline reads ahead, into the next epoch
def _order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """As `epoch_order`: for many rows, every step would wait for it."""
    order = epoch_order(num_rows, seed, epoch, shuffle)
    order.flags.writeable = False
    return order


def _splitmix64(value: int) -> int:
    """The next output of SplitMix64 from the state `value` (Steele, Lea & Flood 2014): every bit of the input
    moves every bit of the output."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


class _Rows:
    """Random access to the rows of the remaining steps of one rank, for `GeneratorDataset`."""

    def __init__(self, rows: TrainingRows, plan: TrainingPlan, start: int, rank: int, shorten: bool) -> None:
        self._rows, self._plan, self._start, self._shorten = rows, plan, start, shorten
        self._per_rank = plan.rows_per_rank
        self._first = rank * self._per_rank
        self._rows_of = lru_cache(maxsize=1)(plan.rows_of)

    def __len__(self) -> int:
        return (self._plan.total_steps - self._start) * self._per_rank

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        step, place = divmod(int(index), self._per_rank)
        step, place = self._start + step, self._first + place
        row = self._row(int(self._rows_of(step)[place]))
        if self._shorten:
            row = shortened(row)
        seed = np.array(self._plan.dropout_seed(step, place), np.int32)
        return (*(row[name] for name in COLUMNS), seed)

    def _row(self, index: int) -> Row:
        if index >= 0:
            return self._rows[index]
        first = self._rows[0]
        return {**first, "labels": np.full_like(first["labels"], IGNORED)}


def training_batches(
    rows: TrainingRows,
    plan: TrainingPlan,
    start_step: int = 0,
    rank: int = 0,
    num_workers: int = 1,
    shorten: bool = False,
) -> ds.Dataset:
    """The micro batches of one rank from `start_step` to the end of the run, as a MindSpore data set.

    The whole run is one pass of this data set: the order contains the epochs, so that a run can resume at any step.
    Columns are TRAINING_COLUMNS: int32 [batch_size, S] each, the seeds int32 [batch_size]. S is `seq_length`, with
    `shorten` the length of the longest row of the batch without what its loss does not depend on, see `shortened`.
    """
    source = _Rows(rows, plan, start_step, rank, shorten)
    data = ds.GeneratorDataset(
        source, list(TRAINING_COLUMNS), num_parallel_workers=num_workers, shuffle=False, python_multiprocessing=False
    )
    joined = _joined_rows if shorten else None
    return data.batch(plan.batch_size, drop_remainder=True, num_parallel_workers=1, per_batch_map=joined)


def _joined_rows(*columns: Any) -> tuple[Any, ...]:
    """The columns of a batch of rows of different lengths, with rows of the same length; MindSpore adds an argument."""
    *rows, seeds, _ = columns
    return (*(equally_long(name, parts) for name, parts in zip(COLUMNS, rows)), seeds)
