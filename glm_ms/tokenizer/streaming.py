"""Text of ids that arrive one by one."""

from __future__ import annotations

from glm_ms.tokenizer.base import SentencePieceTokenizer

# Decoding drops the space before the first piece of a text. This stand-in for the text so far keeps it.
_ANCHOR = "."


class IncrementalDecoder:
    """Decodes ids one by one; the returned text is final and never has half of a character.

    The strings of all `push` calls and of `flush` together are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[str] = []  # not yet returned
        self._byte_run: list[int] = []  # bytes at the end of _pieces
        self._started = False

    def push(self, token_id: int) -> str:
        """Adds an id; returns the text that is final now, often "".

        Raises:
            IndexError: ChatGLM2 only: an id beyond the vocabulary. The decoder stays usable.
        """
        token_id = int(token_id)
        self._pieces.append(self._tokenizer.convert_ids_to_tokens(token_id))
        byte = self._tokenizer.byte_value(token_id)
        self._byte_run = [] if byte is None else [*self._byte_run[-3:], byte]
        return self._take(len(self._pieces) - _incomplete_tail(self._byte_run))

    def flush(self) -> str:
        """Ends the text and returns the rest. The next `push` begins a new text."""
        text = self._take(len(self._pieces))
        self._pieces, self._byte_run, self._started = [], [], False
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


def _incomplete_tail(run: list[int]) -> int:
    """Bytes at the end of `run` that begin a UTF-8 character and do not yet complete it."""
    for length in range(1, min(3, len(run)) + 1):
        byte = run[-length]
        if byte < 0x80 or byte > 0xF4:
            return 0
        if byte >= 0xC2:  # a lead byte tells how long its character is
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < needed else 0
        if byte >= 0xC0:
            return 0
    return 0
