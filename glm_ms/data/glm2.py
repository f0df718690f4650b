"""Preparation of examples for ChatGLM2, as `ptuning/main.py` of its release does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glm_ms.data.records import Record
from glm_ms.data.rows import IGNORED, Row, right_padded_row, row_length

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM2Tokenizer, SentencePieceTokenizer


def train_row(
    tokenizer: ChatGLM2Tokenizer,
    record: Record,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
    source_prefix: str = "",
) -> Row:
    """A training row: the prompt of numbered rounds, the response, </s>.

    Args:
        max_source_length: prompt ids at most, `[gMASK] sop` included; the tail is cut, answer marker and all.
        max_target_length: response ids at most, without </s>.
        ignore_pad_token_for_loss: labels of prompt and padding are -100; else the padding id, as reference.
        source_prefix: text before the prompt.

    Returns:
        int32 [max_source_length + max_target_length + 1] each, padded on the right; labels are not shifted.
    """
    prompt = source_prefix + tokenizer.build_prompt(record.prompt, record.history)
    return source_target_row(
        tokenizer, prompt, record.response, max_source_length, max_target_length, ignore_pad_token_for_loss
    )


def source_target_row(
    tokenizer: SentencePieceTokenizer,
    source: str,
    target: str,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
) -> Row:
    """`train_row` of plain texts: no prompt is built around `source`. It serves either tokenizer."""
    source_ids = tokenizer.encode(source, truncation=True, max_length=max_source_length)
    target_ids = tokenizer.encode(
        target, add_special_tokens=False, truncation=True, max_length=max_target_length
    )
    target_ids.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    labels = [pad] * len(source_ids) + target_ids
    length = row_length(max_source_length, max_target_length)
    row = right_padded_row(source_ids + target_ids, labels, length, pad)
    if ignore_pad_token_for_loss:  # also where the response itself holds the id, an unknown character
        row["labels"] = np.where(row["labels"] == pad, np.int32(IGNORED), row["labels"])
    return row


def has_labels(
    tokenizer: ChatGLM2Tokenizer, record: Record, max_source_length: int, max_target_length: int
) -> bool:
    """Always: source and target are cut apart, so </s> stays a label."""
    return True


def eval_row(
    tokenizer: ChatGLM2Tokenizer,
    record: Record,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
    source_prefix: str = "",
) -> tuple[list[int], list[int]]:
    """Prompt ids, unpadded, and label ids of an example.

    As in the reference the labels begin with `[gMASK] sop`, which count towards `max_target_length`, and
    have no </s>.
    """
    prompt = source_prefix + tokenizer.build_prompt(record.prompt, record.history)
    input_ids = tokenizer.encode(prompt, truncation=True, max_length=max_source_length)
    labels = tokenizer.encode(record.response, truncation=True, max_length=max_target_length)
    if ignore_pad_token_for_loss:
        labels = [IGNORED if index == tokenizer.pad_token_id else index for index in labels]
    return input_ids, labels
