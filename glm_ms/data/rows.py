"""Training rows: padded to one length, and cut again to what a batch needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded on first use, because reading settings imports this module
    import numpy as np

IGNORED = -100  # label without loss

# input_ids, labels, attention_mask, position_ids: int32 [tokens] each; `tokens` is `seq_length` in a data set.
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


def shortened(row: Row) -> Row:
    """The part of a row that its loss depends on.

    Padding on the left (mask 0) goes, so that the place of a token in the row does not depend on the length of other
    rows. What follows the last label goes too: a token sees no later ones. A row without a label keeps two tokens.

    A row that asks a padding token to predict a label stays as it is: such a token sees the whole row.
    """
    import numpy as np

    labels, mask = row["labels"], row["attention_mask"]
    labelled = np.flatnonzero(labels[1:] != IGNORED) + 1
    if not mask[labelled - 1].all():
        return row
    first = int(np.argmax(mask != 0)) if len(labelled) else 0
    last = int(labelled[-1]) + 1 if len(labelled) else 2
    return {name: values[first:last] for name, values in row.items()}


# Of the places that `equally_long` adds; nothing of the row sees them.
_FILL = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}


def equally_long(name: str, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Column `name` of the rows of a batch, padded on the right to the longest of them, int32 [S] each."""
    import numpy as np

    length = max(map(len, columns))
    return [np.pad(column, (0, length - len(column)), constant_values=_FILL[name]) for column in columns]


def _filled(
    input_ids: Sequence[int], labels: Sequence[int], place: slice, length: int, pad_token_id: int, pad_label: int
) -> Row:
    import numpy as np

    row = {"input_ids": np.full(length, pad_token_id, np.int32), "labels": np.full(length, pad_label, np.int32)}
    row["input_ids"][place], row["labels"][place] = input_ids, labels
    return row
