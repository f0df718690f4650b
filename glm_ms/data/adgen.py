"""Records of prompt and response (ADGEN: keywords of a product -> advert) for training and for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_ms.data import glm2, glm3
from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Encoder, EvalRow, Lengths, cut_lengths
from glm_ms.data.records import Record, check_columns, parse_record
from glm_ms.data.rows import Row, check_length, left_padded_row, row_length
from glm_ms.storage.errors import DataError

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer

# `[gMASK] sop` and one token of text.
_SHORTEST_ENCODED = 3


class AdgenEncoder(Encoder):
    """ADGEN records as the release of each model prepares them; the tokenizer says which.

    Args:
        tokenizer: decides by its `model_generation` between ChatGLM2 and ChatGLM3 preparation.
        columns: prompt and response column, optionally a history column.
        max_source_length, max_target_length: ids; a row has their sum and one.
        ignore_pad_token_for_loss: see `glm2.train_ids`; ChatGLM3 knows true only.

    Raises:
        DataError: a setting that cannot be used.
    """

    no_labels = "with a prompt longer than max_source_length allows for; raise it"
    too_long = no_labels

    def __init__(
        self,
        tokenizer: SentencePieceTokenizer,
        columns: Sequence[str] = ("content", "summary"),
        max_source_length: int = 64,
        max_target_length: int = 128,
        ignore_pad_token_for_loss: bool = True,
    ) -> None:
        check_columns(columns)
        check_length("max_source_length", max_source_length, _SHORTEST_ENCODED)
        check_length("max_target_length", max_target_length)
        self.tokenizer = tokenizer
        self.seq_length = row_length(max_source_length, max_target_length)
        self._columns = tuple(columns)
        self._lengths = (max_source_length, max_target_length)
        self._ignore_pad = ignore_pad_token_for_loss
        self._is_chat = tokenizer.model_generation == 3
        if self._is_chat and not ignore_pad_token_for_loss:
            raise DataError(
                "ignore_pad_token_for_loss = false is a setting of ChatGLM2; set it to true for ChatGLM3"
            )

    def read(self, value: Any, place: str) -> Record | None:
        """See `Encoder`."""
        return parse_record(value, self._columns, place)

    def has_labels(self, record: Record) -> bool:
        """See `Encoder`. ChatGLM2 cuts source and target apart, so that </s> always stays a label."""
        if not self._is_chat:
            return True
        return glm3.has_labels(self.tokenizer, glm3.messages_of(record), self.seq_length)

    def train_ids(self, record: Record) -> tuple[list[int], list[int]]:
        """See `Encoder`."""
        if not self._is_chat:
            return glm2.train_ids(self.tokenizer, record, *self._lengths, self._ignore_pad)
        input_ids, labels = glm3.message_ids(self.tokenizer, glm3.messages_of(record))
        return input_ids[: self.seq_length], labels[: self.seq_length]

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        """See `Encoder`."""
        if not self._is_chat:
            return glm2.pad_row(self.tokenizer, input_ids, labels, self.seq_length, self._ignore_pad)
        return left_padded_row(input_ids, labels, self.seq_length, self.tokenizer.pad_token_id)

    def eval_rows(self, record: Record) -> list[EvalRow | None]:
        """See `Encoder`; one, for the last response."""
        max_source_length, max_target_length = self._lengths
        if not self._is_chat:
            row = glm2.eval_row(self.tokenizer, record, max_source_length, max_target_length)
            return [EvalRow(record.prompt, *row)]
        row = glm3.answer_ids(self.tokenizer, glm3.messages_of(record), max_source_length)[-1]
        return [None if row is None else EvalRow(record.prompt, row[0], row[1][:max_target_length])]

    def lengths(self, record: Record) -> Lengths:
        """See `Encoder`."""
        if self._is_chat:
            _, labels = glm3.message_ids(self.tokenizer, glm3.messages_of(record))
            return cut_lengths(labels, self.seq_length)
        prompt = len(self.tokenizer.encode(self.tokenizer.build_prompt(record.prompt, record.history)))
        response = len(self.tokenizer.encode(record.response, add_special_tokens=False))
        max_source_length, max_target_length = self._lengths
        kept = min(prompt, max_source_length), min(response, max_target_length) + 1
        return Lengths(prompt, response + 1, *kept)

    def limits(self) -> dict[str, tuple[str, int]]:
        """See `Encoder`. An answer is counted with its </s>, `max_target_length` without."""
        if self._is_chat:
            return {"whole": ("max_source_length + max_target_length + 1", self.seq_length)}
        return {
            "prompt": ("max_source_length", self._lengths[0]),
            "answer": ("max_target_length + 1", self._lengths[1] + 1),
        }

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        """See `Encoder`."""
        prompt = min(prompt, seq_length - 2)
        return {"max_source_length": prompt, "max_target_length": seq_length - prompt - 1}

    def identity(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "data_loader": "ADGenDataLoader",
            "origin_columns": list(self._columns),
            "max_source_length": self._lengths[0],
            "max_target_length": self._lengths[1],
            "ignore_pad_token_for_loss": self._ignore_pad,
        }


class AdgenDataset(TrainDataset):
    """Training rows of a file of prompts and responses; see `TrainDataset` and `AdgenEncoder`."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: SentencePieceTokenizer,
        columns: Sequence[str] = ("content", "summary"),
        max_source_length: int = 64,
        max_target_length: int = 128,
        ignore_pad_token_for_loss: bool = True,
        num_samples: int | None = None,
        cache: CacheRequest | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        encoder = AdgenEncoder(
            tokenizer, columns, max_source_length, max_target_length, ignore_pad_token_for_loss
        )
        super().__init__(path, encoder, num_samples, cache, say)


class AdgenEvalDataset(EvalDataset):
    """Prompts to generate from and the texts to compare with, as the release of each model prepares them.

    ChatGLM3 leaves prompts of `max_source_length` ids and more out of the evaluation. Of a record with a history the
    last response counts. See `EvalDataset`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: SentencePieceTokenizer,
        columns: Sequence[str] = ("content", "summary"),
        max_source_length: int = 64,
        max_target_length: int = 128,
        num_samples: int | None = None,
    ) -> None:
        check_length("max_target_length", max_target_length, _SHORTEST_ENCODED)
        super().__init__(
            path, AdgenEncoder(tokenizer, columns, max_source_length, max_target_length), num_samples
        )
