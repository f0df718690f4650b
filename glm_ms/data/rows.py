"""Training rows, padded to one length so that a graph is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from glm_ms.storage.errors import DataError

if TYPE_CHECKING:  # loaded on first use, because reading settings imports this module
    import numpy as np

IGNORED = -100  # label without loss

# input_ids, labels, attention_mask, position_ids: int32 [seq_length] each.
Row = dict[str, "np.ndarray"]


def row_length(max_source_length: int, max_target_length: int) -> int:
    """Ids in a training row: source, target and the token that ends it."""
    return max_source_length + max_target_length + 1


def check_length(name: str, value: int, smallest: int = 1) -> None:
    """Raises DataError unless `value` is an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise DataError(f"{name} = {value!r}: must be an integer of at least {smallest}")


def right_padded_row(
    input_ids: Sequence[int], labels: Sequence[int], length: int, pad_token_id: int, pad_label: int = IGNORED
) -> Row:
    """A row padded on the right. As in the reference, padding is visible (mask 1) and positions count through it."""
    import numpy as np

    row = {
        "input_ids": np.full(length, pad_token_id, np.int32),
        "labels": np.full(length, pad_label, np.int32),
        "attention_mask": np.ones(length, np.int32),
        "position_ids": np.arange(length, dtype=np.int32),
    }
    row["input_ids"][: len(input_ids)] = input_ids
    row["labels"][: len(labels)] = labels
    return row


def left_padded_row(input_ids: Sequence[int], labels: Sequence[int], length: int, pad_token_id: int) -> Row:
    """A row padded on the left with mask 0 and position 0; the positions of tokens count from 0."""
    import numpy as np

    padding = length - len(input_ids)
    row = {
        "input_ids": np.full(length, pad_token_id, np.int32),
        "labels": np.full(length, IGNORED, np.int32),
        "attention_mask": np.zeros(length, np.int32),
        "position_ids": np.zeros(length, np.int32),
    }
    row["input_ids"][padding:] = input_ids
    row["labels"][padding:] = labels
    row["attention_mask"][padding:] = 1
    row["position_ids"][padding:] = np.arange(len(input_ids))
    return row
