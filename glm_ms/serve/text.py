"""Text of an answer while its tokens arrive: whole characters, ended by stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer


class AnswerText:
    """Turns ids into text that is final. What may still become a stop string is held back.

    The strings of all `push` calls and of `flush` together are `tokenizer.decode` of all ids, up to the stop string.
    They do not depend on where tokens begin and end.

    Args:
        stop: texts that end the answer, none of them empty.
        include_stop: the text ends with the stop string; otherwise before it.

    Attributes:
        stopped: the stop string that was found; nothing follows it.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._stop, self._include_stop = tuple(stop), include_stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int, search: bool = True) -> str:
        """Adds an id; returns the text that is final now, often "".

        Ids from the vocabulary's end up to its padded size have no text. With `search` False the text of this id
        cannot be part of a stop string.
        """
        if self.stopped is not None or token >= self._vocab_size:
            return ""
        return self._add(self._decoder.push(token), search)

    def flush(self) -> str:
        """Ends the text and returns the rest, with a character that is not whole as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._add(self._decoder.flush(), search=True)
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _add(self, text: str, search: bool) -> str:
        if not search:
            text, self._held = self._held + text, ""
            return text
        text, self._held = self._held + text, ""
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:  # the one that is complete first; of two, the one that began first
            end, _, self.stopped = min(found)
            return text[: end if self._include_stop else end - len(self.stopped)]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[kept:]
        return text[:kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, shorter than `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
