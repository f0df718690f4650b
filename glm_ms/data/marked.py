"""Rows turned back into text, with the parts that bear loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.data.encoder import Encoder
from glm_ms.data.rows import IGNORED

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer

# What stands before a line of a part: without loss; with loss; with the padding id as label.
SILENT, LOSS, PADDING_LABEL = "     | ", "LOSS | ", "PAD  | "
LEGEND = (
    "LOSS | is learnt, PAD | is to become padding (ignore_pad_token_for_loss: False), other lines are read only; "
    "⏎ is a line break in the text, </s> its end"
)
_GREEN, _NORMAL = "\x1b[32m", "\x1b[0m"


def parts(
    tokenizer: SentencePieceTokenizer, input_ids: Sequence[int], labels: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """(marker, text) of each run of tokens that are treated alike. Special tokens are shown by name."""

    def kind(pair: tuple[int, int]) -> str:
        index, label = pair
        if label == IGNORED:
            return SILENT
        return LOSS if label == index else PADDING_LABEL

    for marker, run in groupby(zip(map(int, input_ids), map(int, labels)), kind):
        yield marker, spelled(tokenizer, [index for index, _ in run])


def spelled(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> str:
    """Text of ids; special tokens, </s> and <unk> are written by their names, which `decode` may leave out."""
    names = {tokenizer.get_command(token): token for token in tokenizer.special_tokens}
    names.update({tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.pad_token_id: tokenizer.pad_token})
    text = ""
    for name, run in groupby(ids, names.get):
        run = list(run)
        text += tokenizer.decode(run) if name is None else name * len(run)
    return text


def marked_lines(encoder: Encoder, record: object, color: bool = False) -> Iterator[str]:
    """A record as training gets it, a line for each line of text, each with its marker.

    Args:
        encoder: of the record.
        record: what `Encoder.read` made.
        color: lines that bear loss in green, for terminals.
    """
    input_ids, labels = encoder.train_ids(record)
    lengths = encoder.lengths(record)
    for marker, text in parts(encoder.tokenizer, input_ids, labels):
        lines = [_printable(line) for line in text.split("\n")]
        lines = [f"{line}⏎" for line in lines[:-1]] + [line for line in lines[-1:] if line]
        begin, end = (_GREEN, _NORMAL) if color and marker == LOSS else ("", "")
        yield from (f"{begin}{marker}{line}{end}" for line in lines)
    cut = lengths.prompt + lengths.answer - lengths.kept_prompt - lengths.kept_answer
    if cut:
        yield f"       cut: {lengths.prompt - lengths.kept_prompt} tokens without and " + (
            f"{lengths.answer - lengths.kept_answer} with loss"
        )
    yield from _padding(encoder, input_ids, labels)


def _padding(encoder: Encoder, input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[str]:
    row = encoder.row(input_ids, labels)
    number = len(row["labels"]) - len(input_ids)
    if not number:
        return
    on_the_left = bool((row["attention_mask"] == 0).any())
    padding = row["labels"][:number] if on_the_left else row["labels"][-number:]
    loss = "without loss" if np.all(padding == IGNORED) else "WITH loss (ignore_pad_token_for_loss: False)"
    yield f"       padding: {number} tokens on the {'left' if on_the_left else 'right'}, {loss}"


def _printable(line: str) -> str:
    """A terminal must not obey what stands in a record."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in line
    )
