"""Prompt and answer as `ptuning/main.py` of ChatGLM2-6B prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glm_ms.data.encoder import SHORTEST_PROMPT, Encoder, EvalRow, Lengths, Messages, check_length
from glm_ms.data.rows import IGNORED, Row, right_padded_row
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer import ChatGLM2Tokenizer, SentencePieceTokenizer
from glm_ms.tokenizer.base import CHAT


class SourceTargetEncoder(Encoder):
    """A prompt of numbered rounds, the last answer and </s>; prompt and answer are cut apart, on the right.

    `max_source_length` counts `[gMASK] sop`, `max_target_length` does not count </s>. Rows are padded on the right.
    There is one answer to generate, the last. As in the reference its labels begin with `[gMASK] sop`, which count
    towards `max_target_length`, and have no </s>; without `ignore_pad_token_for_loss` the labels of a prompt are the
    padding id.
    """

    learns_padding = True
    tokenizer: ChatGLM2Tokenizer
    layout = staticmethod(right_padded_row)

    def read(self, value: Any, place: str) -> Messages | None:
        """See `Encoder`; raises DataError also for messages that are not user and assistant in turn."""
        record = super().read(value, place)
        if record and [message.role for message in record] != ["user", "assistant"] * (len(record) // 2):
            raise DataError(
                f"{place}: {type(self.tokenizer).__name__} has no roles: messages must be user and assistant in turn"
            )
        return record

    def has_labels(self, record: Messages) -> bool:
        return True  # cutting the answer leaves </s>

    def train_ids(self, record: Messages) -> tuple[list[int], list[int]]:
        texts, lengths = (self._prompt(record), record[-1].content), (self._max_source_length, self._max_target_length)
        return source_target_ids(self.tokenizer, *texts, *lengths, self._ignore_pad)

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        pad = self.tokenizer.pad_token_id
        return right_padded_row(input_ids, labels, self.seq_length, pad, IGNORED if self._ignore_pad else pad)

    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        check_length("max_target_length", self._max_target_length, SHORTEST_PROMPT)
        encode, pad = self.tokenizer.encode, self.tokenizer.pad_token_id
        input_ids = encode(self._prompt(record), truncation=True, max_length=self._max_source_length)
        labels = encode(record[-1].content, truncation=True, max_length=self._max_target_length)
        if self._ignore_pad:
            labels = [IGNORED if index == pad else index for index in labels]
        return [EvalRow(record[-2].content, input_ids, labels)]

    def lengths(self, record: Messages) -> Lengths:
        prompt = len(self.tokenizer.encode(self._prompt(record)))
        answer = len(self.tokenizer.encode(record[-1].content, add_special_tokens=False))
        kept = min(prompt, self._max_source_length), min(answer, self._max_target_length) + 1
        return Lengths(prompt, answer + 1, *kept)

    def limits(self) -> dict[str, tuple[str, int]]:
        return {
            "prompt": ("max_source_length", self._max_source_length),
            "answer": ("max_target_length + 1", self._max_target_length + 1),
        }

    def _prompt(self, record: Messages) -> str:
        texts = [message.content for message in record]
        return self.tokenizer.build_prompt(texts[-2], list(zip(texts[:-2:2], texts[1:-2:2])))


class PlainEncoder(SourceTargetEncoder):
    """Prompt and answer as one text without a template, `[gMASK] sop prompt answer </s>`, for base models.

    Cut and padded as by `SourceTargetEncoder` (`InputOutputDataset` of ChatGLM3's first finetuning scripts). The
    labels of an evaluation are the ids of the answer alone.
    """

    def read(self, value: Any, place: str) -> Messages | None:
        """See `Encoder`; raises DataError also for a record with a history, a system message or tools."""
        record = Encoder.read(self, value, place)
        if record is not None and len(record) != 2:
            raise DataError(f"{place}: a plain prompt has no history, system message or tools; use template: {CHAT}")
        return record

    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        (row,) = super().eval_rows(record)
        return [None if row is None else row._replace(labels=row.labels[len(self.tokenizer.prefix_tokens) :])]

    def _prompt(self, record: Messages) -> str:
        return record[0].content


def source_target_ids(
    tokenizer: SentencePieceTokenizer,
    source: str,
    target: str,
    max_source_length: int,
    max_target_length: int,
    ignore_pad_token_for_loss: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids and labels of plain texts, without a prompt around `source`; see `SourceTargetEncoder.train_ids`."""
    source_ids = tokenizer.encode(source, truncation=True, max_length=max_source_length)
    target_ids = tokenizer.encode(target, add_special_tokens=False, truncation=True, max_length=max_target_length)
    target_ids.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    if not ignore_pad_token_for_loss:
        return source_ids + target_ids, [pad] * len(source_ids) + target_ids
    # The padding id in the answer itself, an unknown character, has no loss either.
    labels = [IGNORED if index == pad else index for index in target_ids]
    return source_ids + target_ids, [IGNORED] * len(source_ids) + labels
