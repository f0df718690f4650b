"""Grammars that an answer must follow: JSON, JSON schemas, regular expressions, Lark grammars, tool calls.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next. It is imported with the
first grammar: a server without such requests does without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Callable

import numpy as np

from glm_ms.serve.answer import Guide
from glm_ms.tokenizer import SentencePieceTokenizer

_SPACE = "▁"  # how SentencePiece spells a space
# llguidance takes a token that begins with this byte, which UTF-8 never has, as a special token.
_SPECIAL = b"\xff"
# Before a text that is not the beginning of a prompt: what follows gets no leading space.
_ANCHOR = "\n"
# Without these limits a model can write spaces until it reaches its last token.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GuideError(ValueError):
    """A grammar cannot be compiled, or is too complex to follow. The message says why."""


NewGuide = Callable[[], Guide]
Grammar = dict[str, Any]  # an entry of llguidance's list of grammars


class Guides:
    """Compiles grammars for one vocabulary.

    Args:
        tokenizer: its stop tokens end an answer that is complete.
        vocab_size: V, the number of logits of the network. Ids beyond the tokenizer's are never allowed.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._library: Any = None
        self._vocabulary: Any = None
        self._stops = [token for token in tokenizer.stop_token_ids if token < vocab_size]

    def compile(self, body: Grammar | None, start: str | None = None) -> NewGuide:
        """A function that makes the guide of an answer.

        Args:
            body: of `json_schema`, `regex` or `lark`.
            start: Lark grammar around it, which names it `@body`; None: the answer is `body`.

        Raises:
            GuideError: a grammar is wrong, or cannot be enforced.
        """
        grammars = [] if start is None else [{"lark_grammar": start}]
        if body is not None:
            grammars.append(body if start is None else {"name": "body", **body})
        library = self._load()
        first = library.LLMatcher(self._vocabulary, json.dumps({"grammars": grammars}), log_level=0)
        # The first mask shows what the grammar alone does not: expressions that are too complex.
        _TokenGuide(first, self._vocab_size, self._stops).mask()
        return lambda: _TokenGuide(first.deep_copy(), self._vocab_size, self._stops)

    def _load(self) -> Any:
        if self._library is None:
            import llguidance

            wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
            self._vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=self._tokenizer.vocab_size)
            self._library = llguidance
        return self._library


def json_schema(schema: Any) -> Grammar:
    """JSON that a schema describes, on one line. Raises GuideError if the schema is not an object."""
    if not isinstance(schema, Mapping):
        raise GuideError(f"a JSON schema must be an object, found {schema!r:.60}")
    return {"json_schema": {**schema, "x-guidance": _COMPACT}}


def regex(pattern: str) -> Grammar:
    """Text that matches a regular expression as a whole; syntax: Rust's crate `regex`, without look-around."""
    from llguidance import regex_to_lark

    return {"lark_grammar": f"start: /{regex_to_lark(pattern, 'dws')}/"}


def choice(texts: list[str]) -> Grammar:
    """One of some texts."""
    return {"lark_grammar": f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"}


def lark(grammar: str) -> Grammar:
    """Text of the rule `start` of a Lark grammar, in llguidance's dialect."""
    return {"lark_grammar": grammar}


class _Vocabulary:
    """The attributes of a tokenizer that `llguidance.TokenizerWrapper` reads."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = None
        self.tokens = [token_bytes(tokenizer, index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = [index for index, token in enumerate(self.tokens) if token.startswith(_SPECIAL)]

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text in the middle of an answer, where the vocabulary adds no space before it."""
        given = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        anchor = self._tokenizer.encode(_ANCHOR, add_special_tokens=False)
        return self._tokenizer.encode(_ANCHOR + given, add_special_tokens=False)[len(anchor) :]


def token_bytes(tokenizer: SentencePieceTokenizer, index: int) -> bytes:
    """The bytes that a token adds to a text; its name after 0xFF for one without text."""
    byte = tokenizer.byte_value(index)
    if byte is not None:
        return bytes([byte])
    pieces = tokenizer.sp.GetPieceSize()
    if index >= pieces:
        return _SPECIAL + tokenizer.special_tokens[index - pieces].encode()
    piece = tokenizer.sp.IdToPiece(index)
    if tokenizer.sp.IsControl(index) or tokenizer.sp.IsUnknown(index):
        return _SPECIAL + piece.encode()
    return piece.replace(_SPACE, " ").encode()


class _TokenGuide(Guide):
    """A grammar and the tokens so far."""

    def __init__(self, matcher: Any, vocab_size: int, stops: list[int]) -> None:
        self._matcher, self._vocab_size, self._stops = matcher, vocab_size, stops
        self._ended = False

    def mask(self) -> np.ndarray:
        self._check()
        allowed = np.zeros(self._vocab_size, bool)
        if not self.finished():
            found = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: self._vocab_size]
            self._check()
            allowed[: len(found)] = found != 0
        # The library knows one end token; each of the tokenizer's ends a complete answer.
        allowed[self._stops] = self._matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        if token in self._stops and self._matcher.is_accepting():
            self._ended = True
        elif not self._matcher.consume_token(token):
            self._check()
            raise GuideError(f"token {token} does not follow the grammar")

    def finished(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GuideError(_sentence(self._matcher.get_error()))


def _sentence(error: str) -> str:
    """The first line of an error of the library, short."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return (lines[0] if lines else "the grammar cannot be compiled")[:300]
