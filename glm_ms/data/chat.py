"""Conversations of several turns, with and without tools, for training and for generation (ChatGLM3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm_ms.data import glm3
from glm_ms.data.conversations import Messages, parse_conversation, parse_tool_conversation
from glm_ms.data.encoder import Encoder, EvalRow, Lengths, cut_lengths
from glm_ms.data.rows import Row, check_length, left_padded_row, right_padded_row, row_length
from glm_ms.storage.errors import DataError

if TYPE_CHECKING:
    from glm_ms.tokenizer import ChatGLM3Tokenizer, SentencePieceTokenizer

# `[gMASK] sop`, a role token and one token of text.
_SHORTEST = 4


class _ChatEncoder(Encoder):
    """What both forms of conversations share: messages are cut together, on the right."""

    tokenizer: ChatGLM3Tokenizer

    def __init__(self, tokenizer: SentencePieceTokenizer, seq_length: int) -> None:
        if tokenizer.model_generation != 3:
            raise DataError(
                f"{type(tokenizer).__name__} knows no roles; conversations need processor.tokenizer.type: "
                "ChatGLM3Tokenizer"
            )
        self.tokenizer = tokenizer
        self.seq_length = seq_length

    def has_labels(self, record: Messages) -> bool:
        """See `Encoder`."""
        return glm3.has_labels(self.tokenizer, record, self.seq_length)

    def train_ids(self, record: Messages) -> tuple[list[int], list[int]]:
        """See `Encoder`."""
        input_ids, labels = glm3.message_ids(self.tokenizer, record)
        return input_ids[: self.seq_length], labels[: self.seq_length]

    def lengths(self, record: Messages) -> Lengths:
        """See `Encoder`."""
        return cut_lengths(glm3.message_ids(self.tokenizer, record)[1], self.seq_length)

    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        """See `Encoder`."""
        rows: list[EvalRow | None] = []
        for row in glm3.answer_ids(self.tokenizer, record, self._longest_prompt()):
            if row is not None:
                input_ids, labels = row
                # The whole of what the model reads: the last question alone would not explain an answer.
                prompt = self.tokenizer.decode(input_ids)
                row = EvalRow(prompt, input_ids, labels[: self._longest_answer(len(input_ids))])
            rows.append(row)
        return rows

    @abstractmethod
    def _longest_prompt(self) -> int:
        """Ids before an answer to be generated, at most, `<|assistant|>` included."""

    @abstractmethod
    def _longest_answer(self, prompt_length: int) -> int:
        """Ids of an answer, at most."""


class ConversationEncoder(_ChatEncoder):
    """Conversations as `finetune_hf.py` of ChatGLM3 prepares them; see `parse_conversation` for their form.

    Rows are padded on the left. To be generated are the messages of the assistant; one with `max_source_length`
    tokens or more before it is left out.

    Args:
        tokenizer: a ChatGLM3Tokenizer.
        max_source_length, max_target_length: ids; a row has their sum and one.

    Raises:
        DataError: a setting that cannot be used.
    """

    no_labels = "with no answer within max_source_length + max_target_length + 1 tokens; raise one of them"
    too_long = "with more before the answer than max_source_length allows for; raise it"

    def __init__(
        self, tokenizer: SentencePieceTokenizer, max_source_length: int, max_target_length: int
    ) -> None:
        check_length("max_source_length", max_source_length, _SHORTEST - 1)
        check_length("max_target_length", max_target_length)
        super().__init__(tokenizer, row_length(max_source_length, max_target_length))
        self._max_source_length, self._max_target_length = max_source_length, max_target_length

    def read(self, value: Any, place: str) -> Messages:
        """See `Encoder`."""
        return parse_conversation(value, place)

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        """See `Encoder`."""
        return left_padded_row(input_ids, labels, self.seq_length, self.tokenizer.pad_token_id)

    def _longest_prompt(self) -> int:
        return self._max_source_length

    def _longest_answer(self, prompt_length: int) -> int:
        return self._max_target_length

    def limits(self) -> dict[str, tuple[str, int]]:
        """See `Encoder`."""
        return {"whole": ("max_source_length + max_target_length + 1", self.seq_length)}

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        """See `Encoder`. In training only the sum counts; the share of the answer stays as it is, if it fits."""
        answer = min(self._max_target_length, seq_length - _SHORTEST)
        return {"max_source_length": seq_length - answer - 1, "max_target_length": answer}

    def identity(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"data_loader": "ConversationDataLoader", "seq_length": self.seq_length}


class ToolAlpacaEncoder(_ChatEncoder):
    """Conversations with tools and loss flags as `MultiTurnDataset` of ChatGLM3 (finetune_chatmodel_demo) prepares
    them; see `parse_tool_conversation` for their form.

    Rows are padded on the right; as in rows of ChatGLM2 padding is visible and positions count through it. To be
    generated are the messages of the assistant, calls of tools included, but for those with `"loss": false`.

    Args:
        tokenizer: a ChatGLM3Tokenizer.
        max_seq_length: ids in a row.
        max_prompt_length: ids before an answer to be generated, at most; as many as leave room for one id when None.

    Raises:
        DataError: a setting that cannot be used.
    """

    no_labels = (
        "with nothing to learn within max_seq_length tokens (raise it), or with loss: false throughout"
    )
    too_long = (
        "with so much before the answer that max_seq_length leaves no room for generation.max_new_tokens; "
        "raise the former or lower the latter"
    )

    def __init__(
        self, tokenizer: SentencePieceTokenizer, max_seq_length: int, max_prompt_length: int | None = None
    ) -> None:
        check_length("max_seq_length", max_seq_length, _SHORTEST)
        super().__init__(tokenizer, max_seq_length)
        self._max_prompt_length = max_seq_length - 1 if max_prompt_length is None else max_prompt_length

    def read(self, value: Any, place: str) -> Messages:
        """See `Encoder`."""
        return parse_tool_conversation(value, place)

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        """See `Encoder`."""
        return right_padded_row(input_ids, labels, self.seq_length, self.tokenizer.pad_token_id)

    def _longest_prompt(self) -> int:
        return self._max_prompt_length

    def _longest_answer(self, prompt_length: int) -> int:
        return self.seq_length - prompt_length

    def limits(self) -> dict[str, tuple[str, int]]:
        """See `Encoder`."""
        return {"whole": ("max_seq_length", self.seq_length)}

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        """See `Encoder`."""
        return {"max_seq_length": seq_length}

    def identity(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"data_loader": "ToolAlpacaDataLoader", "max_seq_length": self.seq_length}
