"""Batches of raw values to flat arrays of ids and labels, in whichever process."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_ms.data.encoder import Encoder
from glm_ms.data.rows import IGNORED
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue, parse_value

# In place of the number of ids of a record that makes no row.
EMPTY, WITHOUT_LABELS = -1, -2


class PreparedRows(NamedTuple):
    """The rows of some values, unpadded, one after the other.

    Attributes:
        sizes: int64, for every value the number of its ids, or EMPTY or WITHOUT_LABELS.
        input_ids, labels: int32 [sum of the sizes above 0].
        error: what was wrong with the value after the last one of `sizes`.
    """

    sizes: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    error: DataError | None = None


@dataclass(frozen=True)
class PrepareRows:
    """Makes `PreparedRows`; to be given to `map_batches`.

    Args:
        encoder: of the records.
        path: of their file, for errors.
    """

    encoder: Encoder
    path: Path

    def __call__(self, batch: list[RawValue]) -> PreparedRows:
        """Stops at the first value that is no record, with the error."""
        sizes, input_ids, labels = array("q"), array("i"), array("i")
        error = None
        for raw in batch:
            try:
                record = self.encoder.read(parse_value(raw, self.path), f"{self.path}:{raw.line}")
            except DataError as caught:
                error = caught
                break
            if record is None:
                sizes.append(EMPTY)
                continue
            ids_of_record, labels_of_record = self.encoder.train_ids(record)
            if all(label == IGNORED for label in labels_of_record):
                sizes.append(WITHOUT_LABELS)
                continue
            sizes.append(len(ids_of_record))
            input_ids.extend(ids_of_record)
            labels.extend(labels_of_record)
        return PreparedRows(
            np.array(sizes, np.int64), np.array(input_ids, np.int32), np.array(labels, np.int32), error
        )


def first_rows(parts: Iterable[PreparedRows], num_rows: int | None) -> Iterator[PreparedRows]:
    """Parts up to the row with a number, and nothing behind it; all of them if it is None.

    Raises:
        DataError: a value that comes before the end is no record.
    """
    left = num_rows
    for part in parts:
        if left is not None:
            ends = np.flatnonzero(part.sizes > 0)
            if len(ends) >= left:
                yield _cut(part, int(ends[left - 1]) + 1)
                return
            left -= len(ends)
        yield part
        if part.error is not None:
            raise part.error


def _cut(part: PreparedRows, num_values: int) -> PreparedRows:
    sizes = part.sizes[:num_values]
    ids = int(sizes[sizes > 0].sum())
    return PreparedRows(sizes, part.input_ids[:ids], part.labels[:ids])
