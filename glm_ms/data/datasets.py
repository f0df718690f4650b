"""Map-style data sets of files of records: rows for training, prompts and references for evaluation."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.data.cache import CachedRows, CacheRequest, cached_rows
from glm_ms.data.encoder import Encoder, Messages
from glm_ms.data.records import no_records
from glm_ms.data.rows import Row
from glm_ms.spelling import given
from glm_ms.storage.errors import DataError, capped
from glm_ms.storage.json_lines import JsonFile


class _RowsOnDemand:
    """Ids and labels of the rows of a file, encoded on access. Args, attributes and errors as in `TrainDataset`."""

    def __init__(self, path: Path, encoder: Encoder, num_samples: int | None) -> None:
        self._encoder = encoder
        self._file = JsonFile(path)
        self.skipped = self.without_labels = 0
        self.left_out: set[str] = set()
        for raw in self._file.raw_values():
            record = encoder.read_raw(raw, path, self.left_out)
            if record is None:
                self.skipped += 1
            elif not encoder.has_labels(record):
                self.without_labels += 1
            else:
                self._file.append(raw)
                if len(self._file) == num_samples:
                    break

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels of a row, unpadded."""
        record = self._encoder.read(self._file[index], str(self._file.path))
        assert record is not None
        return self._encoder.train_ids(record)


class TrainDataset:
    """Training rows of a file.

    Args:
        path: JSON lines or a JSON array.
        num_samples: usable records at most, from the start of the file; None for all.
        cache: keeps the rows on disk; without it they are encoded on access.
        say: takes a line for the user about the cache.

    Attributes:
        skipped: records skipped because prompt or answer is empty.
        without_labels: records skipped because cutting leaves no label: the mean loss of their batch could be
            undefined.
        left_out: names of what records have without effect, see `DataFormat`.

    Raises:
        DataError: an error in the file or the settings, or no usable record.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: Encoder,
        num_samples: int | None = None,
        cache: CacheRequest | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        _check_num_samples(num_samples)
        self.path, self.seq_length = Path(path), encoder.seq_length
        self._encoder = encoder
        rows: _RowsOnDemand | CachedRows | None = None
        if cache is not None:
            rows = cached_rows(self.path, encoder, num_samples, cache, say or (lambda line: None))
        # Without any row _RowsOnDemand counts the reasons for the error.
        self._rows = _RowsOnDemand(self.path, encoder, num_samples) if rows is None else rows
        self.skipped, self.without_labels = self._rows.skipped, self._rows.without_labels
        self.left_out = self._rows.left_out
        if not len(self):
            raise DataError(self.describe()) if self.skipped or self.without_labels else no_records(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `attention_mask`, `position_ids`: int32 [seq_length] each."""
        return self._encoder.row(*self._rows[_within(index, len(self))])

    def describe(self) -> str:
        """One line: the file, its usable and its skipped records, what is left out of them."""
        refused = [(self.without_labels, self._encoder.no_labels)]
        line = _described(self.path, f"{len(self)} records used", self.skipped, refused, self.left_out)
        if isinstance(self._rows, CachedRows):
            line += f"; its rows are cached in {self._rows.folder}"
        return line


class EvalDataset:
    """Prompts to generate from and texts to compare with, one for each answer of a record.

    Arguments are those of `TrainDataset`.

    Attributes:
        skipped: records skipped because prompt or answer is empty.
        blank: answers skipped because their reference is white space: there is nothing to compare with.
        too_long: answers skipped because their prompt is too long.
        left_out: as in `TrainDataset`.

    Raises:
        DataError: an error in the file or the settings, or no usable record.
    """

    def __init__(self, path: str | Path, encoder: Encoder, num_samples: int | None = None) -> None:
        _check_num_samples(num_samples)
        self.path, self.stop_tokens = Path(path), encoder.stop_tokens
        self._encoder = encoder
        self._file = JsonFile(path)
        # Of every answer its record, and its number in the record.
        self._records, self._numbers = array("q"), array("q")
        self.skipped = self.blank = self.too_long = 0
        self.left_out: set[str] = set()
        for raw in self._file.raw_values():
            record = encoder.read_raw(raw, self.path, self.left_out)
            if record is None:
                self.skipped += 1
            elif self._add(record):
                self._file.append(raw)
            if len(self._file) == num_samples:
                break
        if not len(self):
            unusable = self.skipped or self.blank or self.too_long
            raise DataError(self.describe()) if unusable else no_records(self.path)

    def _add(self, record: Messages) -> bool:
        """Whether a record has an answer that can be used."""
        before = len(self._numbers)
        for number, row in enumerate(self._encoder.eval_rows(record)):
            if row is None:
                self.too_long += 1
            elif not self._encoder.tokenizer.decode(row.labels).strip():
                self.blank += 1
            else:
                self._records.append(len(self._file))
                self._numbers.append(number)
        return len(self._numbers) > before

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` int32 [S], unpadded; `labels` int32 [T], the reference ids; `prompt` and `reference`, texts."""
        index = _within(index, len(self))
        record = self._encoder.read(self._file[self._records[index]], str(self.path))
        row = None if record is None else self._encoder.eval_rows(record)[self._numbers[index]]
        assert row is not None
        return {
            "input_ids": np.array(row.input_ids, np.int32),
            "labels": np.array(row.labels, np.int32),
            "prompt": row.prompt,
            "reference": self._encoder.tokenizer.decode(row.labels).strip(),
        }

    def describe(self) -> str:
        """One line: the file, its usable and its skipped records, what is left out of them."""
        used = f"{len(self._file)} records used"
        if len(self) != len(self._file):
            used = f"{len(self)} answers of {used}"
        too_long = [(self.too_long, self._encoder.too_long)]
        return _described(self.path, used, self.skipped + self.blank, too_long, self.left_out)


def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Row numbers in the order of one epoch. It depends on seed and epoch alone, so that a run can be resumed.

    Every pair of them has its own order, the same on every machine.

    Returns:
        int64 [num_rows], a permutation; 0..num_rows-1 without `shuffle`.

    Raises:
        ValueError: a negative argument.
    """
    for name, value in (("num_rows", num_rows), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} = {value}: must not be negative")
    if not shuffle:
        return np.arange(num_rows, dtype=np.int64)
    # NumPy keeps the raw stream of a bit generator across versions, but not the result of `permutation`.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(raw, kind="stable").astype(np.int64)


def _check_num_samples(num_samples: int | None) -> None:
    if num_samples is not None and num_samples < 1:
        raise DataError(f"{given('num_samples', num_samples)}: must be at least 1; leave it out for all records")


def _within(index: int, length: int) -> int:
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index % length


def _described(path: Path, used: str, empty: int, refused: list[tuple[int, str]], left_out: set[str]) -> str:
    parts = [f"{path}: {used}"]
    if empty:
        parts.append(f"{empty} skipped with an empty prompt or response")
    parts += [f"{number} skipped {why}" for number, why in refused if number]
    return ", ".join(parts) + (f"; not used: {capped(sorted(left_out))}" if left_out else "")
