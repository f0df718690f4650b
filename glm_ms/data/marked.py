"""Rows decoded to text, with the parts that have loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.data.encoder import Encoder, Messages
from glm_ms.data.rows import IGNORED

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer

# Markers of lines: without loss; with loss; with the padding id as label.
SILENT, LOSS, PADDING_LABEL = "     | ", "LOSS | ", "PAD  | "
LEGEND = (
    "LOSS | has loss, PAD | has the padding id as label (ignore_pad_token_for_loss: False), other lines have no loss; "
    "⏎ is a line break in the text, </s> its end"
)
_GREEN, _NORMAL = "\x1b[32m", "\x1b[0m"


def parts(
    tokenizer: SentencePieceTokenizer, input_ids: Sequence[int], labels: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """(marker, text) of each run of tokens with the same treatment; special tokens by name."""

    def kind(pair: tuple[int, int]) -> str:
        index, label = pair
        if label == IGNORED:
            return SILENT
        return LOSS if label == index else PADDING_LABEL

    for marker, run in groupby(zip(map(int, input_ids), map(int, labels)), kind):
        yield marker, spelled(tokenizer, [index for index, _ in run])


def spelled(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> str:
    """Text of ids, with the names of special tokens, </s> and <unk>, which `decode` may omit."""
    names = {tokenizer.get_command(token): token for token in tokenizer.special_tokens}
    names.update({tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.pad_token_id: tokenizer.pad_token})
    text = ""
    for name, group in groupby(ids, names.get):
        run = list(group)
        text += tokenizer.decode(run) if name is None else name * len(run)
    return text


def marked_lines(encoder: Encoder, record: Messages, color: bool = False) -> Iterator[str]:
    """The lines of a record as it is trained, each with its marker; `color`: lines with loss in green."""
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
    """Escapes control characters: a terminal must not obey the text of a record."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )
