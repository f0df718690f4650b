"""The interface between records and rows: `Encoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from glm_ms.data.rows import Row
from glm_ms.spelling import argument
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import RawValue, parse_value

if TYPE_CHECKING:
    from glm_ms.data.formats import DataFormat
    from glm_ms.tokenizer import SentencePieceTokenizer

# `[gMASK] sop` and one token of text.
SHORTEST_PROMPT = 3


class Message(NamedTuple):
    """One message of a record."""

    role: str  # system, user, assistant or observation
    content: str
    metadata: str = ""  # name of the tool that an assistant message calls
    loss: bool = False  # whether the model learns it


Messages = tuple[Message, ...]


class Columns(NamedTuple):
    """Names of the columns of a record of prompt and answer; None: there is no such column."""

    prompt: str
    response: str
    history: str | None = None  # a list of [prompt, response], or of messages, before the prompt
    input: str | None = None  # follows the prompt on a line of its own
    system: str | None = None  # text of a system message
    tools: str | None = None  # a list of tools

    @classmethod
    def of(cls, loader: Any) -> Columns:
        """The columns that `origin_columns` and the keys `history_column` ... of a `data_loader` section name.

        Raises:
            DataError: `origin_columns` has not two or three names, or a name has two meanings.
        """
        names, key = loader.origin_columns, argument("origin_columns")
        if isinstance(names, str) or len(names) not in (2, 3):
            raise DataError(f"{key}: {names!r}: must name prompt and response, optionally history")
        others = {kind: getattr(loader, f"{kind}_column") for kind in cls._fields[2:]}
        if len(names) == 3:
            if others["history"] not in (None, names[2]):
                raise DataError(f"{key} names {names[2]!r} for the history, too; keep it, or history_column")
            others["history"] = names[2]
        columns = cls(*names[:2], **others)
        given = [name for name in columns if name is not None]
        twice = next((name for name in given if given.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"column {twice!r} is named twice; every column has one meaning")
        return columns


# (JSON value, `file:line` for errors, columns) -> messages; None for a record with an empty text.
Reader = Callable[[Any, str, Columns], "Messages | None"]


class Section(Protocol):
    """The keys of a `train_dataset` or `eval_dataset` section that decide about rows; see `glm_ms.settings.schema`.

    `data_loader` has `type` and the keys of `Columns.of`.
    """

    data_loader: Any
    max_source_length: int
    max_target_length: int
    max_seq_length: int | None
    ignore_pad_token_for_loss: bool


class EvalRow(NamedTuple):
    """One answer to generate; ids are unpadded."""

    prompt: str  # for people to read
    input_ids: list[int]  # of the prompt
    labels: list[int]  # of the reference answer


class Lengths(NamedTuple):
    """Tokens of one record, before cutting, and those that remain in the row."""

    prompt: int  # without loss, `[gMASK] sop` and role tokens included
    answer: int  # with loss, </s> included
    kept_prompt: int
    kept_answer: int


class Encoder(ABC):
    """Turns records into ids and labels. Worker processes receive it by pickle.

    Args:
        tokenizer: text to ids.
        data_format: the reader of records.
        section: lengths and columns.
        max_prompt_length: most ids before an answer to generate, for formats without `max_source_length`.

    Attributes:
        seq_length: ids in a row.

    Raises:
        DataError: the section cannot be used.
    """

    needs_roles: ClassVar[bool] = False  # whether the tokenizer must have role tokens
    learns_padding: ClassVar[bool] = False  # whether `ignore_pad_token_for_loss: False` is possible
    # Whether `max_seq_length` is the length of a row, else `max_source_length` + `max_target_length` + 1.
    uses_max_seq_length: ClassVar[bool] = False
    stop_tokens: ClassVar[tuple[str, ...]] = ()  # end a generated answer, besides those of the tokenizer
    layout: ClassVar[Callable[..., Row]]  # pads a row; decides about positions and mask
    # Why a record has no label left, why an answer has no prompt that fits, with the remedy; follow "N skipped ".
    no_labels: ClassVar[str] = "with a prompt longer than max_source_length allows for; raise it"
    too_long: ClassVar[str] = no_labels

    def __init__(
        self,
        tokenizer: SentencePieceTokenizer,
        data_format: DataFormat,
        section: Section,
        max_prompt_length: int | None = None,
    ) -> None:
        name = type(tokenizer).__name__
        if self.needs_roles and not tokenizer.roles:
            raise DataError(f"{name} has no roles, which {section.data_loader.type} needs; use a tokenizer with roles")
        if not section.ignore_pad_token_for_loss and not self.learns_padding:
            raise DataError(f"ignore_pad_token_for_loss = false is not possible with {name}; set it to true")
        self.tokenizer = tokenizer
        self.data_loader: str = section.data_loader.type
        self._format, self._columns = data_format, Columns.of(section.data_loader)
        self._ignore_pad = section.ignore_pad_token_for_loss
        if self.uses_max_seq_length:
            if section.max_seq_length is None:
                raise DataError(f"max_seq_length: missing; {self.data_loader} needs the tokens of a row")
            check_length("max_seq_length", section.max_seq_length, SHORTEST_PROMPT + 1)
            self.seq_length = self._max_target_length = section.max_seq_length
            self._max_source_length = self.seq_length - 1 if max_prompt_length is None else max_prompt_length
        else:
            check_length("max_source_length", section.max_source_length, SHORTEST_PROMPT)
            check_length("max_target_length", section.max_target_length)
            self._max_source_length, self._max_target_length = section.max_source_length, section.max_target_length
            self.seq_length = self._max_source_length + self._max_target_length + 1  # </s> ends a row

    def read(self, value: Any, place: str) -> Messages | None:
        """The messages of a JSON value; None for a record to skip because a text is empty; see `Reader`.

        Raises:
            DataError: not a record of this format.
        """
        return self._format.read(value, place, self._columns)

    def read_raw(self, raw: RawValue, path: Path, left_out: set[str]) -> Messages | None:
        """`read` of a value of a file; adds to `left_out` what the record has beyond that, see `DataFormat`."""
        value = parse_value(raw, path)
        record = self.read(value, f"{path}:{raw.line}")
        left_out.update(self._format.left_out(value, self._columns))
        return record

    def row(self, input_ids: Sequence[int], labels: Sequence[int]) -> Row:
        """The padded row of `train_ids`: int32 [seq_length] each."""
        return type(self).layout(input_ids, labels, self.seq_length, self.tokenizer.pad_token_id)

    @abstractmethod
    def has_labels(self, record: Messages) -> bool:
        """Whether `train_ids` has a label that is not -100; cheaper than `train_ids`."""

    @abstractmethod
    def train_ids(self, record: Messages) -> tuple[list[int], list[int]]:
        """Ids and labels, cut to at most `seq_length`, unpadded; labels are not shifted."""

    @abstractmethod
    def eval_rows(self, record: Messages) -> list[EvalRow | None]:
        """Every answer of a record; None for one whose prompt is too long."""

    @abstractmethod
    def lengths(self, record: Messages) -> Lengths:
        """Tokens of a record, before and after cutting."""

    @abstractmethod
    def limits(self) -> dict[str, tuple[str, int]]:
        """Limits of "prompt" and "answer", or of "whole" if both are cut together: the key, and the tokens kept."""

    def length_keys(self, seq_length: int, prompt: int) -> dict[str, int]:
        """Values of the length keys for rows of `seq_length` with room for a prompt."""
        prompt = min(prompt, seq_length - 2)
        return {"max_source_length": prompt, "max_target_length": seq_length - prompt - 1}

    def identity(self) -> dict[str, Any]:
        """Plain values of all settings that decide about the result of `read` and `train_ids`. It names caches."""
        return {
            "data_loader": self.data_loader,
            "columns": list(self._columns),
            "max_source_length": self._max_source_length,
            "max_target_length": self._max_target_length,
            "ignore_pad_token_for_loss": self._ignore_pad,
        }


def check_length(name: str, value: int, smallest: int = 1) -> None:
    """Raises DataError unless `value` is an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise DataError(f"{name} = {value!r}: must be an integer of at least {smallest}")
