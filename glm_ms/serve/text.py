"""Text of an answer while its tokens arrive: whole characters, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer


class AnswerText:
    """Turns ids into text that is final. What may still become a stop string is held back.

    The strings of all `push` calls and of `flush` together are `tokenizer.decode` of all ids, up to the stop string.
    They do not depend on where tokens begin and end.

    Args:
        stop, include_stop: as of `StopSearch`.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._search = StopSearch(stop, include_stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that was found; nothing follows it."""
        return self._search.found

    def push(self, token: int, search: bool = True) -> str:
        """Adds an id; returns the text that is final now, often "".

        Ids from the vocabulary's end up to its padded size have no text. With `search` False the text of this id
        cannot be part of a stop string.
        """
        if self.stopped is not None or token >= self._vocab_size:
            return ""
        return self._search.push(self._decoder.push(token), search)

    def flush(self) -> str:
        """Ends the text and returns the rest, with a character that is not whole as U+FFFD."""
        if self.stopped is not None:
            return ""
        return self._search.push(self._decoder.flush()) + self._search.flush()


class StopSearch:
    """Ends a text at the first of some stop strings. What may still become one is held back.

    Args:
        stop: texts that end the text, none of them empty.
        include: the text ends with the stop string; otherwise before it.

    Attributes:
        found: the stop string that was found; nothing follows it.
    """

    def __init__(self, stop: Sequence[str] = (), include: bool = False) -> None:
        self._stop, self._include = tuple(stop), include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, search: bool = True) -> str:
        """Adds text; returns what is final now. With `search` False this text is no part of a stop string."""
        if self.found is not None:
            return ""
        text, self._held = self._held + text, ""
        if not search:
            return text
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if ends:  # the one that is complete first; of two, the one that began first
            end, _, self.found = min(ends)
            return text[: end if self._include else end - len(self.found)]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """Ends the text and returns the rest."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
