"""`tokenizer.json` of a SentencePiece BPE vocabulary: the format of Hugging Face's library `tokenizers`, equal ids.

Sources: sentencepiece_model.proto (the settings in a `tokenizer.model`), the format of `tokenizers` 0.20 and later.
"""

from __future__ import annotations

import io
from typing import Any

from glm_ms.convert.protobuf import Span, WireError, fields
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import SentencePieceTokenizer

# Names of special tokens in the exported files where that of the released tokenizer is a word of ordinary text. Those
# are the names of ChatGLM-4.
SPELLINGS = {"sop": "<sop>", "eop": "<eop>"}
# The chat template writes this noncharacter of Unicode into text that spells a special token; the normalizer removes
# it after the special tokens were found, so that such text stays text.
GUARD = "\ufdd0"
_SPACE = "▁"
# Fields of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_KIND, _NORMAL, _USER_DEFINED, _BYTE = 3, 1, 4, 6
_MODEL_TYPE, _SUFFIX, _BPE = 3, 24, 2
_CHARSMAP, _EXTRA_SPACES, _ESCAPE = 2, 4, 5


def spelling(token: str) -> str:
    """A special token as the exported files write it."""
    return SPELLINGS.get(token, token)


def special_spellings(tokenizer: SentencePieceTokenizer) -> dict[str, int]:
    """Spelling of every token that is never made of text -> id."""
    pieces = (index for index in range(tokenizer.sp.GetPieceSize()) if _is_control(tokenizer, index))
    own = {spelling(token): tokenizer.get_command(token) for token in tokenizer.special_tokens}
    return {**{tokenizer.sp.IdToPiece(index): index for index in pieces}, **own}


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Text gets the ids of `tokenizer.encode`: `[gMASK] sop` before a text, </s> after a pair. Special tokens that a text
    spells are special, as everywhere in `tokenizers`; with `split_special_tokens=True` they are text, as here.

    Raises:
        CheckpointError: the vocabulary is not BPE with byte fallback and without normalization.
    """
    check_settings(tokenizer, "a tokenizer.json")
    special = special_spellings(tokenizer)
    by_id = sorted(special.items(), key=lambda item: item[1])
    vocabulary = {tokenizer.sp.IdToPiece(index): index for index in range(tokenizer.sp.GetPieceSize())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(text, index) for text, index in by_id],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(tokenizer)},
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer, special),
        "decoder": {"type": "Sequence", "decoders": _decoders(tokenizer)},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokenizer.unk_token, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": _merges(tokenizer)
        },
    }  # fmt: skip


def _is_control(tokenizer: SentencePieceTokenizer, index: int) -> bool:
    return tokenizer.sp.IsControl(index) or tokenizer.sp.IsUnknown(index)


def _is_normal(tokenizer: SentencePieceTokenizer, index: int) -> bool:
    return not (_is_control(tokenizer, index) or tokenizer.sp.IsByte(index) or tokenizer.sp.IsUnused(index))


def _merges(tokenizer: SentencePieceTokenizer) -> list[list[str]]:
    """Pairs of pieces that become one, first those of the best score.

    SentencePiece joins the adjacent pair whose result has the best score, of equal ones the leftmost. `tokenizers`
    joins the first pair of this list.
    """
    sp = tokenizer.sp
    normal = (index for index in range(sp.GetPieceSize()) if _is_normal(tokenizer, index))
    score = {sp.IdToPiece(index): sp.GetScore(index) for index in normal}
    merges = []
    for piece in sorted(score, key=lambda piece: -score[piece]):
        pairs = ((piece[:place], piece[place:]) for place in range(1, len(piece)))
        merges += [list(pair) for pair in pairs if all(part in score for part in pair)]
    return merges


def _added_token(text: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": True}


def _normalizers(tokenizer: SentencePieceTokenizer) -> list[dict[str, Any]]:
    guard = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return [guard, *([{"type": "Prepend", "prepend": _SPACE}] if tokenizer.adds_space else ()), space]


def _decoders(tokenizer: SentencePieceTokenizer) -> list[dict[str, Any]]:
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return [space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if tokenizer.adds_space else ())]


def _post_processor(tokenizer: SentencePieceTokenizer, special: dict[str, int]) -> dict[str, Any]:
    """`[gMASK] sop A`, `[gMASK] sop A B </s>`."""
    names = {index: text for text, index in special.items()}
    prefix, eos = [names[index] for index in tokenizer.prefix_tokens], names[tokenizer.eos_token_id]

    def token(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    def sequence(name: str) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": 0}}

    single = [*map(token, prefix), sequence("A")]
    used = {text: {"id": text, "ids": [special[text]], "tokens": [text]} for text in (*prefix, eos)}
    return {
        "type": "TemplateProcessing", "single": single, "pair": [*single, sequence("B"), token(eos)],
        "special_tokens": used
    }  # fmt: skip


def check_settings(tokenizer: SentencePieceTokenizer, output: str) -> None:
    """Raises CheckpointError for a vocabulary whose ids `output`, which the message names, could not reproduce."""
    file, content = tokenizer.vocab_file, tokenizer.sp.serialized_model_proto()
    try:
        kinds, trainer, normalizer = _settings(content)
    except WireError as error:
        raise CheckpointError(f"{file}: {error}; fetch it again") from None
    charsmap = normalizer.get(_CHARSMAP)
    problems = {
        "its model is not BPE": trainer.get(_MODEL_TYPE) != _BPE,
        "it lacks byte fallback": _BYTE not in kinds,
        "it has user-defined symbols": _USER_DEFINED in kinds,
        "it normalizes text": isinstance(charsmap, tuple) and charsmap[1] > 0,
        "it removes spaces": bool(normalizer.get(_EXTRA_SPACES, True)),
        "it does not mark spaces": not normalizer.get(_ESCAPE, True),
        "it marks the end of words": bool(trainer.get(_SUFFIX, False)),
    }
    found = [text for text, is_so in problems.items() if is_so]
    if found:
        raise CheckpointError(
            f"{file}: {', '.join(found)}; {output} is made of vocabularies like those of ChatGLM2 and "
            "ChatGLM3: BPE with byte fallback, without normalization"
        )


def _settings(content: bytes) -> tuple[set[int], dict[int, int | Span], dict[int, int | Span]]:
    """Kinds of pieces in a SentencePiece model; its settings of training and of normalization, by field number."""
    file, kinds = io.BytesIO(content), set[int]()
    settings: dict[int, dict[int, int | Span]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, span in fields(file, 0, len(content)):
        if not isinstance(span, tuple):
            continue
        inner = dict(fields(file, span[0], sum(span))) if number in (_PIECE, *settings) else {}
        if number == _PIECE:
            kind = inner.get(_KIND, _NORMAL)
            kinds.add(kind if isinstance(kind, int) else _NORMAL)
        elif number in settings:
            settings[number] = inner
    return kinds, settings[_TRAINER], settings[_NORMALIZER]
