"""Preparation of examples for ChatGLM2, as `ptuning/main.py` of its release does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm_ms.data.records import Record
from glm_ms.data.rows import IGNORED, Row, right_padded_row

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM2Tokenizer, SentencePieceTokenizer


def train_ids(
    tokenizer: ChatGLM2Tokenizer,
    record: Record,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
    source_prefix: str = "",
) -> tuple[list[int], list[int]]:
    """Ids and labels of a training row, unpadded: the prompt of numbered rounds, the response, </s>.

    Args:
        max_source_length: prompt ids at most, `[gMASK] sop` included; the tail is cut, answer marker and all.
        max_target_length: response ids at most, without </s>.
        ignore_pad_token_for_loss: labels of prompt and padding are -100; else the padding id, as reference.
        source_prefix: text before the prompt.

    Returns:
        Two lists of at most max_source_length + max_target_length + 1; labels are not shifted.
    """
    prompt = source_prefix + tokenizer.build_prompt(record.prompt, record.history)
    return source_target_ids(
        tokenizer, prompt, record.response, max_source_length, max_target_length, ignore_pad_token_for_loss
    )


def source_target_ids(
    tokenizer: SentencePieceTokenizer,
    source: str,
    target: str,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
) -> tuple[list[int], list[int]]:
    """`train_ids` of plain texts: no prompt is built around `source`. It serves either tokenizer."""
    source_ids = tokenizer.encode(source, truncation=True, max_length=max_source_length)
    target_ids = tokenizer.encode(
        target, add_special_tokens=False, truncation=True, max_length=max_target_length
    )
    target_ids.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    if not ignore_pad_token_for_loss:
        return source_ids + target_ids, [pad] * len(source_ids) + target_ids
    # Also where the response itself holds the id, an unknown character.
    labels = [IGNORED if index == pad else index for index in target_ids]
    return source_ids + target_ids, [IGNORED] * len(source_ids) + labels


def pad_row(
    tokenizer: SentencePieceTokenizer,
    input_ids: Sequence[int],
    labels: Sequence[int],
    length: int,
    ignore_pad_token_for_loss: bool = True,
) -> Row:
    """The row of `train_ids`, padded on the right: int32 [length] each."""
    pad = tokenizer.pad_token_id
    return right_padded_row(input_ids, labels, length, pad, IGNORED if ignore_pad_token_for_loss else pad)


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
