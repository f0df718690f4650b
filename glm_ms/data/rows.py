"""Training rows, padded to one length so that a graph is compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded on first use, because reading settings imports this module
    import numpy as np

IGNORED = -100  # label without loss

# input_ids, labels, attention_mask, position_ids: int32 [seq_length] each.
Row = dict[str, "np.ndarray"]


def right_padded_row(
    input_ids: Sequence[int], labels: Sequence[int], length: int, pad_token_id: int, pad_label: int = IGNORED
) -> Row:
    """A row padded on the right. As in the reference, padding is visible (mask 1) and positions count through it."""
    import numpy as np

    row = _filled(input_ids, labels, slice(len(input_ids)), length, pad_token_id, pad_label)
    return {**row, "attention_mask": np.ones(length, np.int32), "position_ids": np.arange(length, dtype=np.int32)}


def left_padded_row(input_ids: Sequence[int], labels: Sequence[int], length: int, pad_token_id: int) -> Row:
    """A row padded on the left with mask 0 and position 0; the positions of tokens count from 0."""
    import numpy as np

    padding = length - len(input_ids)
    row = _filled(input_ids, labels, slice(padding, length), length, pad_token_id, IGNORED)
    places = np.arange(-padding, len(input_ids), dtype=np.int32)
    return {**row, "attention_mask": (places >= 0).astype(np.int32), "position_ids": np.maximum(places, 0)}


def _filled(
    input_ids: Sequence[int], labels: Sequence[int], place: slice, length: int, pad_token_id: int, pad_label: int
) -> Row:
    import numpy as np

    row = {"input_ids": np.full(length, pad_token_id, np.int32), "labels": np.full(length, pad_label, np.int32)}
    row["input_ids"][place], row["labels"][place] = input_ids, labels
    return row
