"""Prompts: from lists, arrays or tensors of ids to checked `Prompt`s."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np

from glm_ms.generation.config import GenerationConfig


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, without padding: int32 [S] each, S >= 1; positions are 0, 1, ... unless given otherwise."""

    ids: np.ndarray
    positions: np.ndarray


def prepare_prompts(
    input_ids: Any, attention_mask: Any = None, position_ids: Any = None, *, vocab_size: int, pad_token_id: int = 0
) -> list[Prompt]:
    """Checks prompts, see `checked_rows`, and removes their padding.

    The mask may hide ids anywhere, on the left, on the right or between others: positions count the remaining ids.

    Raises:
        ValueError: see `checked_rows`; or a mask hides a whole prompt.

    Warns:
        UserWarning: a row begins or ends with `pad_token_id` and no mask says whether that is padding.
    """
    rows, masks, positions = checked_rows(input_ids, attention_mask, position_ids, vocab_size)
    for index, (row, mask) in enumerate(zip(rows, masks)):
        if not mask.any():
            raise ValueError(f"attention_mask: row {index} hides every token: leave at least one")
        if attention_mask is None and pad_token_id in (row[0], row[-1]):
            problem = f"row {index} begins or ends with the padding id {pad_token_id} and counts as prompt there"
            warnings.warn(f"input_ids: {problem}; give an attention_mask if it is padding", UserWarning, stacklevel=2)
            break
    return [
        Prompt(row[mask].astype(np.int32), places[mask].astype(np.int32))
        for row, mask, places in zip(rows, masks, positions)
    ]


def checked_rows(
    input_ids: Any, attention_mask: Any, position_ids: Any, vocab_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Ids, masks (bool) and positions of one or several rows, [S] each; S may differ from row to row.

    Args:
        input_ids: integers: one row (list or [S]), or several (lists of any lengths, or [B, S]), as lists, NumPy
            arrays or tensors with `asnumpy()`.
        attention_mask: 0 or 1 for each id, same shape; None: no id is padding.
        position_ids: position of each id, same shape, at least 0; None: 0, 1, ... over the ids that are not padding,
            0 on padding.
        vocab_size: ids run from 0 to vocab_size - 1.

    Raises:
        ValueError: not integers, an id outside the vocabulary, an empty row, or another shape; it names the row.
    """
    rows = integer_rows(input_ids, "input_ids")
    for index, row in enumerate(rows):
        outside = np.flatnonzero((row < 0) | (row >= vocab_size))
        if outside.size:
            raise ValueError(
                f"input_ids: row {index}, place {outside[0]}: id {row[outside[0]]} is outside the vocabulary "
                f"0..{vocab_size - 1}; encode the text with the tokenizer of this network"
            )
    masks = [np.ones(row.shape, bool) for row in rows] if attention_mask is None else _mask_rows(attention_mask, rows)
    positions = [np.maximum(np.cumsum(mask) - 1, 0) * mask for mask in masks]
    if position_ids is not None:
        positions = integer_rows(position_ids, "position_ids", like=rows)
        for index, row in enumerate(positions):
            if row.min() < 0 or row.max() > np.iinfo(np.int32).max:
                raise ValueError(
                    f"position_ids: row {index} runs from {row.min()} to {row.max()}: "
                    "expected positions from 0 upwards that fit 32 bits"
                )
    return rows, masks, positions


def new_token_limits(prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]) -> np.ndarray:
    """Most tokens each prompt may get, int [B]: what `max_new_tokens` and `max_length` of its config allow.

    Raises:
        ValueError: a prompt alone has `max_length` tokens or more.
    """
    limits = []
    for index, (prompt, config) in enumerate(zip(prompts, configs)):
        length, limit = len(prompt.ids), config.max_new_tokens
        if config.max_length is not None:
            limit = min(limit, config.max_length - length)
        if limit < 1:
            raise ValueError(
                f"max_length = {config.max_length}: prompt {index} has {length} tokens, which leaves no room for an "
                "answer; shorten it, or raise max_length"
            )
        limits.append(limit)
    return np.array(limits)


def integer_rows(values: Any, name: str, like: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    """Rows of integers, [S] each; of the same lengths as those of `like`, the rows of input_ids."""
    rows = _rows(values, name, like)
    for index, row in enumerate(rows):
        if row.dtype.kind not in "iu":
            raise ValueError(f"{name}: row {index}: expected integers, found {row.dtype}")
    return rows


def _mask_rows(attention_mask: Any, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    masks = _rows(attention_mask, "attention_mask", like)
    for index, mask in enumerate(masks):
        if mask.dtype.kind not in "biuf":
            raise ValueError(f"attention_mask: row {index}: expected 0 and 1, found {mask.dtype}")
        wrong = np.flatnonzero((mask != 0) & (mask != 1))
        if wrong.size:
            raise ValueError(f"attention_mask: row {index} contains {mask[wrong[0]]}: expected only 0 and 1")
    return [mask == 1 for mask in masks]


def _rows(values: Any, name: str, like: Sequence[np.ndarray] | None) -> list[np.ndarray]:
    """Splits one or several sequences into 1-D arrays of whatever type they have; `like` as in `integer_rows`."""
    if hasattr(values, "asnumpy"):
        values = values.asnumpy()
    elif not isinstance(values, (list, tuple)):
        values = np.asarray(values)
    if isinstance(values, np.ndarray) and values.ndim not in (1, 2):
        found = f"shape {values.shape}" if values.ndim else f"{values.dtype} without dimensions"
        hint = "; for text give the input_ids that the tokenizer returns" if name == "input_ids" else ""
        raise ValueError(f"{name}: expected one sequence [S] or a batch [B, S], found {found}{hint}")
    if not len(values):
        raise ValueError(f"{name}: empty: give at least one token")
    if isinstance(values[0], (Number, str, np.generic)):
        values = [values]
    rows = []
    for index, row in enumerate(values):
        place = f"{name}: row {index}"
        try:
            row = np.asarray(row.asnumpy() if hasattr(row, "asnumpy") else row)
        except ValueError:  # sequences of different lengths nested too deep
            raise ValueError(f"{place} is not a sequence of integers") from None
        if row.ndim != 1:
            raise ValueError(f"{place}: expected a sequence of integers, found shape {row.shape}")
        if not row.size:
            raise ValueError(f"{place} is empty: give at least one token")
        rows.append(row)
    if like is not None and len(rows) != len(like):
        raise ValueError(f"{name}: {len(rows)} rows for {len(like)} rows of input_ids")
    for index, (row, other) in enumerate(zip(rows, like or ())):
        if row.size != other.size:
            raise ValueError(f"{name}: row {index} has length {row.size}, input_ids has {other.size}")
    return rows
