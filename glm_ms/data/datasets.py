"""Map-style data sets over files of records: rows for training, prompts and references for evaluation."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.data.cache import CachedRows, CacheRequest, NoRows, cached_rows
from glm_ms.data.encoder import Encoder
from glm_ms.data.records import no_records
from glm_ms.data.rows import Row
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import JsonFile, parse_value


class RowsOnDemand:
    """Ids and labels of the rows of a file, made when asked for; in memory is where each record stands.

    Args, attributes and errors: as `TrainDataset`.
    """

    def __init__(self, path: Path, encoder: Encoder, num_samples: int | None) -> None:
        self._encoder = encoder
        self._file = JsonFile(path)
        self.skipped = self.without_labels = 0
        for raw in self._file.raw_values():
            record = encoder.read(parse_value(raw, path), f"{path}:{raw.line}")
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
        return self._encoder.train_ids(self._encoder.read(self._file[index], str(self._file.path)))


class TrainDataset:
    """Training rows of a file.

    Args:
        path: JSON lines or a JSON array.
        encoder: what becomes of a record.
        num_samples: usable records at most, from the start of the file; all when None.
        cache: keep the rows on disk; else they are made when asked for.
        say: takes a line for the user about the cache.

    Attributes:
        seq_length: ids in a row.
        skipped: records passed over because prompt or response is empty.
        without_labels: records passed over because no label is left after cutting: with nothing to predict they
            would make the mean loss of their batch undefined.

    Raises:
        DataError: a fault of the file or of a setting, or no usable record.
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
        self._rows = _rows(self.path, encoder, num_samples, cache, say or (lambda line: None))
        self.skipped, self.without_labels = self._rows.skipped, self._rows.without_labels
        if not len(self):
            raise self._nothing()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `attention_mask`, `position_ids`: int32 [seq_length] each."""
        return self._encoder.row(*self._rows[_within(index, len(self))])

    def describe(self) -> str:
        """One line: the file, its usable records and those passed over."""
        refused = [(self.without_labels, self._encoder.no_labels)]
        line = _described(self.path, f"{len(self)} records used", self.skipped, refused)
        if isinstance(self._rows, CachedRows):
            line += f"; its rows are kept in {self._rows.folder}"
        return line

    def _nothing(self) -> DataError:
        if self.skipped or self.without_labels:
            return DataError(self.describe())
        return no_records(self.path)


class EvalDataset:
    """Prompts to generate from and the texts to compare with: one for each answer of a record.

    Args:
        path, num_samples: as `TrainDataset`.
        encoder: what becomes of a record.

    Attributes:
        skipped: records passed over because prompt or response is empty.
        blank: answers passed over because their reference is white space: there is nothing to compare with.
        too_long: answers skipped because their prompt is too long.
        stop_tokens: see `Encoder`.

    Raises:
        DataError: a fault of the file or of a setting, or no usable record.
    """

    def __init__(self, path: str | Path, encoder: Encoder, num_samples: int | None = None) -> None:
        _check_num_samples(num_samples)
        self.path, self.stop_tokens = Path(path), encoder.stop_tokens
        self._encoder = encoder
        self._file = JsonFile(path)
        # Of every answer: its record, and its number in there.
        self._records, self._numbers = array("q"), array("q")
        self.skipped = self.blank = self.too_long = 0
        for raw in self._file.raw_values():
            record = encoder.read(parse_value(raw, self.path), f"{path}:{raw.line}")
            if record is None:
                self.skipped += 1
            elif self._add(record):
                self._file.append(raw)
            if len(self._file) == num_samples:
                break
        if not len(self):
            passed_over = self.skipped or self.blank or self.too_long
            raise DataError(self.describe()) if passed_over else no_records(self.path)

    def _add(self, record: Any) -> bool:
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
        """`input_ids` int32 [S], unpadded; `labels` int32 [T], the reference ids; `prompt` and `reference`,
        texts."""
        index = _within(index, len(self))
        record = self._encoder.read(self._file[self._records[index]], str(self.path))
        row = self._encoder.eval_rows(record)[self._numbers[index]]
        assert row is not None
        return {
            "input_ids": np.array(row.input_ids, np.int32),
            "labels": np.array(row.labels, np.int32),
            "prompt": row.prompt,
            "reference": self._encoder.tokenizer.decode(row.labels).strip(),
        }

    def describe(self) -> str:
        """One line: the file, its usable records and those passed over."""
        used = f"{len(self._file)} records used"
        if len(self) != len(self._file):
            used = f"{len(self)} answers of {used}"
        return _described(
            self.path, used, self.skipped + self.blank, [(self.too_long, self._encoder.too_long)]
        )


def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Row numbers in the order of one epoch. It depends on seed and epoch alone, so that a run can be resumed.

    Args:
        num_rows: rows of the data set.
        seed, epoch: not negative; every pair has its own order, the same on every machine.
        shuffle: 0..num_rows-1 if false.

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
    # NumPy keeps the raw stream of a bit generator across versions, but not the result of `permutation`.
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(raw, kind="stable").astype(np.int64)


def _rows(
    path: Path,
    encoder: Encoder,
    num_samples: int | None,
    cache: CacheRequest | None,
    say: Callable[[str], None],
) -> RowsOnDemand | CachedRows:
    if cache is not None:
        try:
            return cached_rows(path, encoder, num_samples, cache, say)
        except NoRows:
            pass  # the other way counts why, for the error
    return RowsOnDemand(path, encoder, num_samples)


def _check_num_samples(num_samples: int | None) -> None:
    if num_samples is not None and num_samples < 1:
        raise DataError(f"num_samples = {num_samples}: must be at least 1, or null for all records")


def _within(index: int, length: int) -> int:
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index % length


def _described(path: Path, used: str, empty: int, refused: list[tuple[int, str]]) -> str:
    parts = [f"{path}: {used}"]
    if empty:
        parts.append(f"{empty} skipped with an empty prompt or response")
    parts += [f"{number} skipped {why}" for number, why in refused if number]
    return ", ".join(parts)
