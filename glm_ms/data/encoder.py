"""What a kind of records becomes: the interface between files and rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from glm_ms.data.rows import IGNORED, Row

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer


class EvalRow(NamedTuple):
    """One answer to be generated.

    Attributes:
        prompt: its text, for people to read.
        input_ids: prompt ids, unpadded.
        labels: ids of the answer to compare with.
    """

    prompt: str
    input_ids: list[int]
    labels: list[int]


class Lengths(NamedTuple):
    """Tokens of one record.

    Attributes:
        prompt: all that bear no loss, `[gMASK] sop` and role tokens included, before anything is cut.
        answer: all that bear loss, </s> included, before anything is cut.
        kept_prompt, kept_answer: those that are left in the row.
    """

    prompt: int
    answer: int
    kept_prompt: int
    kept_answer: int


class Encoder(ABC):
    """Records of one kind to ids and labels. It can be pickled: worker processes get it this way.

    Attributes:
        seq_length: ids in a row.
        tokenizer: text to ids.
        no_labels: why a record may have no label left, and the remedy; follows "N skipped ".
        too_long: why an answer may have no prompt that fits, and the remedy; follows "N skipped ".
    """

    no_labels: ClassVar[str]
    too_long: ClassVar[str]
    seq_length: int
    tokenizer: SentencePieceTokenizer

    @abstractmethod
    def read(self, value: Any, place: str) -> Any:
        """The record that a JSON value stands for, in a form of its own; None if it is to be passed over as empty.

        Args:
            value: what JSON says.
            place: `file:line`, to begin an error with.

        Raises:
            DataError: it is no record of this kind.
        """

    @abstractmethod
    def has_labels(self, record: Any) -> bool:
        """Whether `train_ids` holds a label that is not -100; cheaper than to make them."""

    @abstractmethod
    def train_ids(self, record: Any) -> tuple[list[int], list[int]]:
        """Ids and labels, cut to at most `seq_length`, unpadded; labels are not shifted."""

    @abstractmethod
    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        """The row of `train_ids`, padded: int32 [seq_length] each."""

    @abstractmethod
    def eval_rows(self, record: Any) -> list[EvalRow | None]:
        """Every answer of a record; None for one whose prompt is too long."""

    @abstractmethod
    def lengths(self, record: Any) -> Lengths:
        """Tokens of a record, before and after cutting."""

    @abstractmethod
    def limits(self) -> dict[str, tuple[str, int]]:
        """Where records are cut: "prompt", "answer", "whole" -> the key that says so, and the tokens that are kept.
        Without an entry for "prompt" and "answer" the two are cut together."""

    @abstractmethod
    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        """Values of the length keys that give rows of `seq_length`, with room for a prompt."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides what `read` and `train_ids` make of a file, but for the vocabulary; plain values."""


def cut_lengths(labels: Sequence[int], length: int) -> Lengths:
    """`Lengths` of a record whose prompt and answers are cut together, to `length` ids on the right."""
    answer = sum(label != IGNORED for label in labels)
    kept_answer = sum(label != IGNORED for label in labels[:length])
    kept = min(len(labels), length)
    return Lengths(len(labels) - answer, answer, kept - kept_answer, kept_answer)
