"""What ChatGLM2 and ChatGLM3 tokenizers share: SentencePiece, special tokens, truncation and padding.

Behaviour follows `tokenization_chatglm.py` of the released models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_ms.storage.suggest import did_you_mean
from glm_ms.tokenizer.padding import pad_features
from glm_ms.tokenizer.vocabulary import VocabularyError, load_vocabulary

__all__ = ["SentencePieceTokenizer", "VocabularyError"]

# The end of ChatGLM's training data stood in its answers as this mark.
_TRAINING_DATE = ("[[训练时间]]", "2023年")
_TEMPLATE_OPENING = re.compile(r"\[gMASK\] *sop")


class SentencePieceTokenizer:
    """A SentencePiece vocabulary followed by special tokens; a subclass adds the prompt of its model.

    Special tokens take the ids from `sp.GetPieceSize()` on, in the order of `special_tokens`. Text is
    encoded by SentencePiece alone, so text that spells a special token never becomes one.

    Args:
        vocab_file: the SentencePiece model (`tokenizer.model`); any vocabulary with <unk> and </s> works.

    Attributes:
        model_generation: 2 or 3, the ChatGLM whose prompts are built.
        vocab_size: pieces and special tokens together.
        pad_token_id, eos_token_id: `pad` is <unk>, as in the released models.
        prefix_tokens: ids of `[gMASK] sop`, which open every text.

    Raises:
        VocabularyError: the file is missing or not a SentencePiece model.
    """

    model_generation: int
    special_tokens: tuple[str, ...]
    padding_side = "left"

    def __init__(self, vocab_file: str | Path) -> None:
        self.vocab_file = str(vocab_file)
        self.sp = load_vocabulary(vocab_file)
        self._num_pieces = self.sp.GetPieceSize()
        self.vocab_size = self._num_pieces + len(self.special_tokens)
        self.pad_token_id = self.sp.unk_id()
        self.eos_token_id = self.sp.eos_id()
        self.pad_token = self.unk_token = self.sp.IdToPiece(self.pad_token_id)
        self.eos_token = self.sp.IdToPiece(self.eos_token_id)
        self._special_ids = {token: self._num_pieces + i for i, token in enumerate(self.special_tokens)}
        self._special_names = {index: token for token, index in self._special_ids.items()}
        self._commands = dict(self._special_ids)
        self._commands.update({"<eos>": self.eos_token_id, "<pad>": self.pad_token_id})
        if self.sp.bos_id() >= 0:
            self._commands["<bos>"] = self.sp.bos_id()
        # Ids whose token is the empty string: a negative id stands for "not defined".
        self._silent_ids = {self.eos_token_id, self.pad_token_id, self.sp.bos_id()}
        self.prefix_tokens = [self.get_command("[gMASK]"), self.get_command("sop")]
        self._adds_space = self.sp.EncodeAsPieces("a")[0].startswith("▁")

    # ------------------------------------------------------------------ hooks

    def _special_piece(self, token: str) -> str:
        """What `decode` writes for a special token."""
        raise NotImplementedError

    def _unknown_piece(self, index: int) -> str:
        """What `decode` writes for an id beyond the vocabulary."""
        raise NotImplementedError

    def _encode_template_body(self, body: str) -> list[int]:
        """Ids of template text after the opening `[gMASK]sop`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ text to ids

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text, without special tokens.

        Raises:
            TypeError: `text` is not a string.
            ValueError: `text` holds half of a surrogate pair.
        """
        return self.sp.EncodeAsPieces(_checked(text))

    def _text_ids(self, text: str) -> list[int]:
        return self._piece_ids(text)

    def _piece_ids(self, text: str) -> list[int]:
        return self.sp.EncodeAsIds(_checked(text))

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
            add_special_tokens: whether `[gMASK] sop` and </s> are added.
            truncation: cut the text on the right (of a pair, the longer text first) to `max_length` ids,
                special tokens included.
            max_length: ids at most, with `truncation`.

        Raises:
            TypeError: a text is not a string.
            ValueError: `max_length` is missing or leaves no room for text.
        """
        first = self._text_ids(text)
        second = None if text_pair is None else self._text_ids(text_pair)
        if truncation:
            special = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
            first, second = _truncate(first, second, special, max_length)
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
    ) -> dict[str, list]:
        """Encodes one text or a list of texts.

        Args:
            text, text_pair: a string, or lists of equal length.
            padding: False; True or "longest" (to the longest of the list); "max_length". Always on the left.
            pad_to_multiple_of: rounds the padded length up.
            add_special_tokens, truncation, max_length: as in `encode`.

        Returns:
            `input_ids`, `attention_mask` (1 = token, 0 = padding) and `position_ids` (0 on padding, tokens
            from 0): lists of int, one level deeper for a list of texts.

        Raises:
            TypeError: a text is not a string.
            ValueError: unknown `padding`, `max_length` missing or without effect, lists of unequal length.
        """
        if max_length is not None and not truncation and padding != "max_length":
            raise ValueError("max_length has no effect without truncation=True or padding='max_length'")
        single = isinstance(text, str)
        texts = [text] if single else list(text)
        pairs = [text_pair] if single else [None] * len(texts) if text_pair is None else list(text_pair)
        if len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(pairs)} text pairs")
        rows = [
            {"input_ids": self.encode(first, second, add_special_tokens, truncation, max_length)}
            for first, second in zip(texts, pairs)
        ]
        padded = pad_features(
            rows,
            self.pad_token_id,
            padding,
            max_length if padding == "max_length" else None,
            pad_to_multiple_of,
        )
        return {name: rows[0] for name, rows in padded.items()} if single else padded

    def pad(
        self,
        features: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, list]:
        """Pads encoded texts on the left.

        Args:
            features: mappings with `input_ids` and optionally `attention_mask`, `position_ids`; or one
                mapping of lists.
            padding, max_length, pad_to_multiple_of: as in `__call__`.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`: lists of lists of int.

        Raises:
            ValueError: an unknown key, `input_ids` missing, lengths that differ within a feature, unknown
                `padding`, or `padding="max_length"` without `max_length`.
        """
        if isinstance(features, Mapping):
            features = [dict(zip(features, values)) for values in zip(*features.values())]
        return pad_features(features, self.pad_token_id, padding, max_length, pad_to_multiple_of)

    # ------------------------------------------------------------------ chat template in text form

    def is_template(self, text: str) -> bool:
        """Whether `text` begins with `[gMASK]sop`, spaces between them allowed: see `encode_template`."""
        return _TEMPLATE_OPENING.match(text) is not None

    def encode_template(self, text: str) -> list[int]:
        """Ids of text that is already written in the chat template, the way `decode` writes it.

        This is the one way in which text becomes special tokens, so do not put text of strangers through it.

        Raises:
            ValueError: the text does not begin with `[gMASK]sop`, or breaks the template of this model.
        """
        opening = _TEMPLATE_OPENING.match(text)
        if opening is None:
            raise ValueError(f"{text[:40]!r}: template text must begin with '[gMASK]sop'")
        return self.prefix_tokens + self._encode_template_body(self._without_space(text[opening.end() :]))

    def _without_space(self, text: str) -> str:
        """`text` less the space that `decode` writes for the vocabulary's own leading space."""
        return text[1:] if self._adds_space and text.startswith(" ") else text

    # ------------------------------------------------------------------ ids to text

    def get_command(self, token: str) -> int:
        """Id of a special token, or of <bos>, <eos>, <pad>.

        Raises:
            AssertionError: no such special token (the type the reference raises).
        """
        if token not in self._commands:
            hint = did_you_mean(token, self._commands, f"; it has {', '.join(self._commands)}")
            raise AssertionError(f"{token!r} is no special token of {type(self).__name__}{hint}")
        return self._commands[token]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Id of a piece or special token, or of each in a list; <unk> where there is none."""
        if isinstance(tokens, str):
            index = self._special_ids.get(tokens)
            return self.sp.PieceToId(tokens) if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """Piece of an id, or of each in a list; "" for <unk>, <s>, </s> and negative ids.

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
        if index < self._num_pieces:
            return self.sp.IdToPiece(index)
        if index < self.vocab_size:
            return self._special_piece(self._special_names[index])
        return self._unknown_piece(index)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of pieces; a string that is no piece stands for itself."""
        return self.sp.DecodePieces(list(tokens)) if tokens else ""

    def byte_value(self, index: int) -> int | None:
        """The byte (0 to 255) that a byte-fallback piece stands for, None for any other id."""
        if not 0 <= index < self._num_pieces or not self.sp.IsByte(index):
            return None
        return int(self.sp.IdToPiece(index)[3:5], 16)  # a byte piece is spelled <0xE4>

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids.

        Args:
            ids: one id or a list or array of them.
            skip_special_tokens: accepted for callers that pass it. As in the reference it changes nothing:
                <unk>, <s> and </s> are never written, ChatGLM2 writes no special token, and ChatGLM3 writes
                all of its own ones.

        Raises:
            IndexError: ChatGLM2 only: an id beyond the vocabulary.
        """
        tokens = self.convert_ids_to_tokens(ids)
        return self.convert_tokens_to_string([tokens] if isinstance(tokens, str) else tokens)


def replace_training_date(text: str) -> str:
    """Fills in the date that the models leave open."""
    return text.replace(*_TRAINING_DATE)


def sequence_dict(ids: list[int]) -> dict[str, list[int]]:
    """`input_ids`, `attention_mask` (ones) and `position_ids` (0..n-1) of one unpadded sequence."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, found {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half of a surrogate pair ({text[error.start]!r}); remove it"
        ) from None
    return text


def _truncate(
    first: list[int], second: list[int] | None, num_special: int, max_length: int | None
) -> tuple[list[int], list[int] | None]:
    """Cuts to `max_length - num_special` ids, taking from the longer text, from the second when equal."""
    if max_length is None:
        raise ValueError("truncation=True needs max_length")
    if max_length <= num_special:
        raise ValueError(
            f"max_length = {max_length} leaves no room for text beside {num_special} special tokens; raise it"
        )
    room = max_length - num_special
    if second is None:
        return first[:room], None
    keep_first, keep_second = len(first), len(second)
    while keep_first + keep_second > room:
        if keep_first > keep_second:
            keep_first -= 1
        else:
            keep_second -= 1
    return first[:keep_first], second[:keep_second]
