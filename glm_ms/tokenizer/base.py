"""Base of the tokenizers: SentencePiece, special tokens, truncation and padding; text of ids that arrive one by one.

Behaviour follows `tokenization_chatglm.py` of the released models.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece

from glm_ms.storage.errors import FileError
from glm_ms.storage.suggest import did_you_mean, misspelled
from glm_ms.tokenizer.answers import AnswerParser

# Decoding drops the space before the first piece of a text. This stand-in for the text so far keeps it.
_ANCHOR = "."
# Values of `SentencePieceTokenizer.template`.
CHAT, PLAIN = "chat", "plain"
# The file of the released models.
_RELEASED_BYTES = 1_018_370
_RELEASED_SHA256 = "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"
_FEATURE_KEYS = ("input_ids", "attention_mask", "position_ids")
# Keys of messages: calls in the form of other models; all that ChatGLM2 does not have.
FOREIGN_CALLS = ("tool_calls", "function_call")
OF_CHATGLM3 = ("metadata", "tools", *FOREIGN_CALLS)
# Option -> its values; see `SentencePieceTokenizer.options`.
_OPTION_VALUES: dict[str, tuple[Any, ...]] = {
    "template": (CHAT, PLAIN),
    "padding_side": ("left", "right"),
    "truncation_side": ("left", "right"),
    "encode_special_tokens": (True, False),
}


class VocabularyError(FileError):
    """A vocabulary file cannot be used. The message names the file and the remedy."""


class SentencePieceTokenizer(ABC):
    """A SentencePiece vocabulary followed by special tokens; a subclass adds the prompt template of its model.

    Special tokens have the ids from `sp.GetPieceSize()` on, in the order of `special_tokens`. SentencePiece alone
    encodes text, so text that spells a special token never becomes one. `pad` is <unk>, as in the released models.

    Args:
        vocab_file: the SentencePiece model (`tokenizer.model`); any vocabulary with <unk> and </s> works.
        template: "chat": the prompt template of the class; "plain": prompts are text without a template, which a base
            model continues up to </s>.
        padding_side, truncation_side: "left" or "right", where padding is added and where long texts are cut.

    Attributes:
        vocab_size: pieces and special tokens together.
        prefix_tokens: ids of `[gMASK] sop`, which open every text.
        adds_space: the vocabulary puts a space before every text.
        options: names of the attributes that may be set later, those of the arguments; all others are read-only.

    Raises:
        VocabularyError: the file is missing, unreadable or not a SentencePiece model, or lacks </s>.
        ValueError: an option has another value.
    """

    special_tokens: ClassVar[tuple[str, ...]]
    roles: ClassVar[tuple[str, ...]] = ()  # of messages that the prompt template knows
    stop_tokens: ClassVar[tuple[str, ...]] = ("<eos>",)  # end an answer
    template_opening: ClassVar[re.Pattern[str]] = re.compile(r"\[gMASK\] *sop")  # of text in the prompt template
    options: ClassVar[tuple[str, ...]] = ("template", "padding_side", "truncation_side")

    def __init__(
        self,
        vocab_file: str | Path,
        template: str = CHAT,
        padding_side: str = "left",
        truncation_side: str = "right",
    ) -> None:
        self.template, self.padding_side, self.truncation_side = template, padding_side, truncation_side
        self.vocab_file = str(vocab_file)
        self.sp = _load_vocabulary(vocab_file)
        self._num_pieces = self.sp.GetPieceSize()
        self.vocab_size = self._num_pieces + len(self.special_tokens)
        self.pad_token_id = self.sp.unk_id()
        self.eos_token_id = self.sp.eos_id()
        self.pad_token = self.unk_token = self.sp.IdToPiece(self.pad_token_id)
        self.eos_token = self.sp.IdToPiece(self.eos_token_id)
        self._special_ids = {token: self._num_pieces + i for i, token in enumerate(self.special_tokens)}
        self._commands = {**self._special_ids, "<eos>": self.eos_token_id, "<pad>": self.pad_token_id}
        if self.sp.bos_id() >= 0:
            self._commands["<bos>"] = self.sp.bos_id()
        # Ids whose token is the empty string. A vocabulary without <s> has the negative id of it.
        self._silent_ids = {self.eos_token_id, self.pad_token_id, self.sp.bos_id()}
        self.prefix_tokens = [self.get_command("[gMASK]"), self.get_command("sop")]
        self.adds_space = self.sp.EncodeAsPieces("a")[0].startswith("▁")
        self._complete = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ValueError for an unknown value of an option, AttributeError for any other attribute."""
        if name in self.options:
            check_option(name, value)
        elif "_complete" in self.__dict__:
            hint = did_you_mean(name, self.options, f"; only {', '.join(self.options)} can be set")
            raise AttributeError(f"{type(self).__name__}.{name} cannot be set{hint}")
        super().__setattr__(name, value)

    @abstractmethod
    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> dict[str, list[int]]:
        """The prompt template: a new message `query` of `role` after earlier messages, oldest first.

        Returns:
            `input_ids`, which end where the answer begins, `attention_mask`, `position_ids`, each a list [S] of int.
        """

    @abstractmethod
    def add_answer(self, output: str, query: str, history: Sequence[Any] | None, role: str) -> tuple[Any, list[Any]]:
        """The end of a round that `build_chat_input` began with the same arguments.

        `output` is the decoded answer without stop tokens. Returns the answer for the user, and the new history, for
        the next round; the given history does not change.
        """

    def tools_of(self, history: Sequence[Any] | None) -> list[str]:
        """Names of the tools that the model may call in a conversation; none unless the template knows tools."""
        return []

    def answer_parser(self, tools: Iterable[str] = ()) -> AnswerParser:
        """A parser of one answer of this model, to which the names of the tools of its prompt are given.

        Raises:
            ValueError: tools for a model without tools.
        """
        if list(tools):
            raise ValueError(f"tools: {type(self).__name__} with template = {self.template!r} knows none")
        return AnswerParser()

    def _plain_input(self, query: str, history: Sequence[Any] | None, role: str) -> dict[str, list[int]]:
        """`build_chat_input` with the template "plain".

        Raises:
            ValueError: a plain text has no earlier messages and no role.
        """
        if history or role != "user":
            raise ValueError(f"template = {PLAIN!r}: a prompt is one text, without history, system message or tools")
        return sequence_dict(self.encode(query))

    @abstractmethod
    def _special_piece(self, index: int) -> str:
        """Text that `decode` writes for the id of a special token, or for one beyond the vocabulary."""

    @abstractmethod
    def _encode_template_body(self, body: str) -> list[int]:
        """Ids of template text after the opening `[gMASK]sop`."""

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text, without special tokens.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` has half of a surrogate pair.
        """
        return self.sp.EncodeAsPieces(checked(text))

    def _piece_ids(self, text: str) -> list[int]:
        return self.sp.EncodeAsIds(checked(text))

    _text_ids = _piece_ids

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens around one text (`[gMASK] sop`), or around two (and </s>)."""
        return len(self.prefix_tokens) + bool(pair)

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> list[int]:
        """Ids of `[gMASK] sop text`, or of `[gMASK] sop text text_pair </s>`.

        Args:
            truncation: cut the text at `truncation_side` (of a pair, the longer text first) to `max_length` ids,
                special tokens included.

        Raises:
            TypeError: a text is not a string.
            ValueError: `max_length` is missing, has no effect or leaves no room for text.
        """
        if max_length is not None and not truncation:
            raise ValueError("max_length has no effect without truncation=True")
        first = self._text_ids(text)
        second = None if text_pair is None else self._text_ids(text_pair)
        if truncation:
            special = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
            first, second = truncate_ids(first, second, special, max_length, self.truncation_side)
        ids = [*self.prefix_tokens, *first] if add_special_tokens else list(first)
        if second is not None:
            ids += second
            if add_special_tokens:
                ids.append(self.eos_token_id)
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
    ) -> dict[str, list]:
        """Encodes one text or a list of texts.

        Args:
            text, text_pair: a string, or lists of equal length.
            padding: False; True or "longest" (to the longest of the list); "max_length".
            pad_to_multiple_of: rounds the padded length up.
            padding_side: replaces the option of the tokenizer.
            add_special_tokens, truncation, max_length: as in `encode`.

        Returns:
            `input_ids`, `attention_mask` (1 = token, 0 = padding) and `position_ids` (0 on padding, tokens from 0):
            lists of int, one level deeper for a list of texts.

        Raises:
            TypeError: a text is not a string.
            ValueError: unknown `padding`, `max_length` missing or without effect, lists of unequal length.
        """
        if max_length is not None and not truncation and padding != "max_length":
            raise ValueError("max_length has no effect without truncation=True or padding='max_length'")
        single = isinstance(text, str)
        texts: list[Any] = [text] if single else list(text)
        pairs: list[Any] = [text_pair] if single else [None] * len(texts) if text_pair is None else list(text_pair)
        if len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} text pairs")
        rows = [
            {
                "input_ids": self.encode(
                    first, second, add_special_tokens, truncation, max_length if truncation else None
                )
            }
            for first, second in zip(texts, pairs)
        ]
        target = max_length if padding == "max_length" else None
        padded = self.pad(rows, padding, target, pad_to_multiple_of, padding_side)
        return {name: rows[0] for name, rows in padded.items()} if single else padded

    def pad(
        self,
        features: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
    ) -> dict[str, list]:
        """Pads encoded texts, as `__call__`: ids with `pad_token_id`, masks and positions with 0.

        Args:
            features: mappings with `input_ids` and optionally `attention_mask` (default ones) and `position_ids`
                (default 0..n-1); or one mapping of lists. A row longer than the target length stays as it is.

        Raises:
            ValueError: an unknown key, `input_ids` missing, lengths that differ within a feature, unknown
                `padding` or `padding_side`, `padding="max_length"` without `max_length`, or `pad_to_multiple_of`
                without effect or below 1.
        """
        side = self.padding_side if padding_side is None else check_option("padding_side", padding_side)
        if isinstance(features, Mapping):
            features = [dict(zip(features, values)) for values in zip(*features.values())]
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f"padding = {padding!r}: must be False, True, 'longest' or 'max_length'")
        if (padding == "max_length") != (max_length is not None):
            raise ValueError(f"padding = {padding!r} with max_length = {max_length}: max_length goes with 'max_length'")
        if pad_to_multiple_of is not None and not (
            padding and type(pad_to_multiple_of) is int and pad_to_multiple_of > 0
        ):
            raise ValueError(f"pad_to_multiple_of = {pad_to_multiple_of!r}: needs padding, and a number of at least 1")
        rows = [_completed(feature) for feature in features]
        target = max_length or 0
        if padding and max_length is None:
            target = max((len(row["input_ids"]) for row in rows), default=0)
        if padding and pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        fill = dict(zip(_FEATURE_KEYS, (self.pad_token_id, 0, 0)))

        def padded(key: str, values: list[int]) -> list[int]:
            padding = [fill[key]] * (target - len(values))
            return padding + values if side == "left" else values + padding

        return {key: [padded(key, row[key]) for row in rows] for key in _FEATURE_KEYS}

    def is_template(self, text: str) -> bool:
        """Whether `text` begins as the prompt template, with `[gMASK]sop`: see `encode_template`."""
        return self.template_opening.match(text) is not None

    def encode_template(self, text: str) -> list[int]:
        """Ids of text in the chat template, as `decode` writes it.

        This is the only way in which text becomes special tokens, so do not use it for untrusted text. In text without
        a line break `\\n` means one: a shell passes it on as two characters.

        Raises:
            ValueError: the text does not begin with `[gMASK]sop`, or breaks the template of this model.
        """
        opening = self.template_opening.match(text)
        if opening is None:
            raise ValueError(f"{text[:40]!r}: template text must begin with '[gMASK]sop'")
        body = self._without_space(text[opening.end() :])
        return self.prefix_tokens + self._encode_template_body(body if "\n" in body else body.replace("\\n", "\n"))

    def _without_space(self, text: str) -> str:
        """`text` without the space that `decode` writes for the leading space of the vocabulary."""
        return text[1:] if self.adds_space and text.startswith(" ") else text

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer."""
        tokens = self.stop_tokens if self.template == CHAT else SentencePieceTokenizer.stop_tokens
        return [self.get_command(token) for token in tokens]

    def get_command(self, token: str) -> int:
        """Id of a special token, or of <bos>, <eos>, <pad>.

        Raises:
            AssertionError: no such special token (the type the reference raises).
        """
        if token not in self._commands:
            hint = did_you_mean(token, self._commands, f"; it has {', '.join(self._commands)}")
            raise AssertionError(f"{token!r} is not a special token of {type(self).__name__}{hint}")
        return self._commands[token]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a piece or special token, or a list of the ids of several; that of <unk> for any other text."""
        if isinstance(tokens, str):
            index = self._special_ids.get(tokens)
            return self.sp.PieceToId(tokens) if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Piece of an id, or a list of the pieces of several; "" for <unk>, <s>, </s> and negative ids.

        Raises:
            IndexError: ChatGLM2 only: an id beyond the vocabulary.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if isinstance(ids, int):
            return self._id_to_token(ids)
        return [self._id_to_token(int(index)) for index in ids]

    def _id_to_token(self, index: int) -> str:
        if index < 0 or index in self._silent_ids:
            return ""
        return self.sp.IdToPiece(index) if index < self._num_pieces else self._special_piece(index)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of pieces; a string that is not a piece is written as it is."""
        return self.sp.DecodePieces(list(tokens)) if tokens else ""

    def byte_value(self, index: int) -> int | None:
        """The byte (0 to 255) of a byte-fallback piece, None for any other id."""
        if not 0 <= index < self._num_pieces or not self.sp.IsByte(index):
            return None
        return int(self.sp.IdToPiece(index)[3:5], 16)  # a byte piece is spelled <0xE4>

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of one id or of several.

        `skip_special_tokens` has no effect, as in the reference: <unk>, <s> and </s> are never written, ChatGLM2 writes
        no special token, and ChatGLM3 writes all of its own.

        Raises:
            IndexError: ChatGLM2 only: an id beyond the vocabulary.
        """
        tokens = self.convert_ids_to_tokens(ids)
        return self.convert_tokens_to_string([tokens] if isinstance(tokens, str) else tokens)


class IncrementalDecoder:
    """Decodes ids one by one; the returned text is final and never has half of a character.

    The strings of all `push` calls and of `flush` together are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[str] = []  # not yet returned
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")  # of the byte pieces at the end of _pieces
        self._started = False

    def push(self, token_id: int) -> str:
        """Adds an id; returns the text that is final now, often "".

        Raises:
            IndexError: ChatGLM2 only: an id beyond the vocabulary. The decoder stays usable.
        """
        token_id = int(token_id)
        self._pieces.append(self._tokenizer.convert_ids_to_tokens(token_id))
        byte = self._tokenizer.byte_value(token_id)
        if byte is None:
            self._bytes.reset()
        else:
            self._bytes.decode(bytes([byte]))
        incomplete, _ = self._bytes.getstate()
        return self._take(len(self._pieces) - len(incomplete))

    def flush(self) -> str:
        """Ends the text and returns the rest. The next `push` begins a new text."""
        text = self._take(len(self._pieces))
        self._pieces, self._started = [], False
        self._bytes.reset()
        return text

    def _take(self, count: int) -> str:
        pieces = self._pieces[:count]
        if not self._started:
            text = self._tokenizer.convert_tokens_to_string(pieces)
            if not text:  # later spaces depend on these pieces
                return ""
            self._started = True
        else:
            text = self._tokenizer.convert_tokens_to_string([_ANCHOR, *pieces])[len(_ANCHOR) :]
        del self._pieces[:count]
        return text


def history_items(history: Any, forms: str) -> Sequence[Any]:
    """The items of a history, none for None; ValueError if it is not a list. `forms` says what the items may be."""
    if history is None:
        return []
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Sequence):
        raise ValueError(f"history = {history!r:.80}: must be a list of {forms}")
    return history


def tell_unknown_keys(message: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Warns about keys of a message that have no effect; ValueError for one that is nearly a known key."""
    others = [key for key in message if key not in known and message[key] not in (None, "", [], {})]
    for key in others:
        near = misspelled(key, [name for name in known if name not in message])
        if near:
            raise ValueError(f"{place}: key {key!r} is not known; did you mean {near[0]!r}?")
    if others:
        text = f"{place}: {', '.join(map(repr, others))}: no effect; known are {', '.join(known)}"
        warnings.warn(text, stacklevel=5)


def check_option(name: str, value: Any) -> Any:
    """The value of an option of the tokenizers; ValueError if it is none of them."""
    values = _OPTION_VALUES[name]
    if not isinstance(value, type(values[0])) or value not in values:
        raise ValueError(f"{name} = {value!r}: must be {' or '.join(map(repr, values))}")
    return value


def sequence_dict(ids: list[int]) -> dict[str, list[int]]:
    """`input_ids`, `attention_mask` (ones) and `position_ids` (0..n-1) of one unpadded sequence."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}


def checked(text: str) -> str:
    """`text` itself; TypeError if it is not a string, ValueError if it has half of a surrogate pair."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half of a surrogate pair ({text[error.start]!r}); remove it"
        ) from None
    return text


def truncate_ids(
    first: list[int], second: list[int] | None, num_special: int, max_length: int | None, side: str
) -> tuple[list[int], list[int] | None]:
    """Cuts to `max_length - num_special` ids, taking from the longer text, from the second when equal."""

    def keep(ids: list[int], count: int) -> list[int]:
        return ids[:count] if side == "right" else ids[max(len(ids) - count, 0) :]

    if max_length is None:
        raise ValueError("truncation=True needs max_length")
    if max_length <= num_special:
        raise ValueError(
            f"max_length = {max_length} leaves no room for text beside {num_special} special tokens; raise it"
        )
    room = max_length - num_special
    if second is None:
        return keep(first, room), None
    keep_first, keep_second = len(first), len(second)
    while keep_first + keep_second > room:
        if keep_first > keep_second:
            keep_first -= 1
        else:
            keep_second -= 1
    return keep(first, keep_first), keep(second, keep_second)


def _completed(feature: Mapping[str, Any]) -> dict[str, list[int]]:
    unknown = [key for key in feature if key not in _FEATURE_KEYS]
    if unknown or "input_ids" not in feature:
        problem = f"unknown key {unknown[0]!r}" if unknown else "input_ids is missing"
        raise ValueError(f"{problem}; a feature has {', '.join(_FEATURE_KEYS)}")
    row = {key: [int(value) for value in feature[key]] for key in feature}
    length = len(row["input_ids"])
    row.setdefault("attention_mask", [1] * length)
    row.setdefault("position_ids", list(range(length)))
    for key in _FEATURE_KEYS:
        if len(row[key]) != length:
            raise ValueError(f"{key} has {len(row[key])} values, input_ids {length}")
    return row


def _load_vocabulary(vocab_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    if not vocab_file or not isinstance(vocab_file, (str, os.PathLike)):
        raise VocabularyError(f"vocab_file = {vocab_file!r}: give the path of a SentencePiece file (tokenizer.model)")
    path = Path(vocab_file)
    if path.is_dir():
        raise VocabularyError(f"{path}: is a folder; give the SentencePiece file in it (tokenizer.model)")
    try:
        serialized = path.read_bytes()
    except FileNotFoundError:
        raise VocabularyError(f"{path}: no such file; give the SentencePiece vocabulary (tokenizer.model)") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise VocabularyError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(serialized) == _RELEASED_BYTES and hashlib.sha256(serialized).hexdigest() != _RELEASED_SHA256:
        raise VocabularyError(
            f"{path}: damaged: it has the size of the tokenizer.model that ChatGLM2 and ChatGLM3 share, but not its "
            f"SHA-256, {_RELEASED_SHA256}; fetch it again"
        )
    vocabulary = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.LoadFromSerializedProto(serialized)
        vocabulary.IdToPiece(list(range(vocabulary.GetPieceSize())))
    except UnicodeDecodeError:
        raise VocabularyError(f"{path}: damaged: a piece is not UTF-8; fetch it again") from None
    except (RuntimeError, OSError):
        hint = "it is a Git LFS pointer, " if serialized.startswith(b"version https://git-lfs") else ""
        raise VocabularyError(
            f"{path}: {hint}not a whole SentencePiece model ({len(serialized)} bytes); fetch it again"
        ) from None
    if vocabulary.eos_id() < 0:
        raise VocabularyError(f"{path}: defines no </s>; train the vocabulary with eos_id >= 0")
    return vocabulary
