"""Left padding of encoded texts, as the released tokenizers pad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KEYS = ("input_ids", "attention_mask", "position_ids")


def pad_features(
    features: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    padding: bool | str,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, list[list[int]]]:
    """Pads `input_ids` with `pad_token_id`, `attention_mask` and `position_ids` with 0, on the left.

    A mask of ones and positions 0..n-1 are made where a feature has none. A row longer than the target
    length stays as it is.

    Raises:
        ValueError: see `SentencePieceTokenizer.pad`.
    """
    if padding not in (False, True, "longest", "max_length"):
        raise ValueError(f"padding = {padding!r}: must be False, True, 'longest' or 'max_length'")
    if (padding == "max_length") != (max_length is not None):
        raise ValueError(
            f"padding = {padding!r} with max_length = {max_length}: max_length goes with 'max_length'"
        )
    rows = [_completed(feature) for feature in features]
    target = 0
    if padding:
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        target = max_length if max_length is not None else longest
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
    fill = dict(zip(_KEYS, (pad_token_id, 0, 0)))
    return {key: [[fill[key]] * (target - len(row[key])) + row[key] for row in rows] for key in _KEYS}


def _completed(feature: Mapping[str, Any]) -> dict[str, list[int]]:
    unknown = [key for key in feature if key not in _KEYS]
    if unknown or "input_ids" not in feature:
        problem = f"unknown key {unknown[0]!r}" if unknown else "input_ids is missing"
        raise ValueError(f"{problem}; a feature has {', '.join(_KEYS)}")
    row = {key: [int(value) for value in feature[key]] for key in feature}
    length = len(row["input_ids"])
    row.setdefault("attention_mask", [1] * length)
    row.setdefault("position_ids", list(range(length)))
    for key in _KEYS:
        if len(row[key]) != length:
            raise ValueError(f"{key} has {len(row[key])} values, input_ids {length}")
    return row
