"""Rounds of a conversation: the `chat` and `stream_chat` of the released models."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer, Text

if TYPE_CHECKING:
    from glm_ms.generation.glm import GLMForCausalLM

# Those of `chat` in modeling_chatglm.py.
_MAX_LENGTH = 8192
_SAMPLING = {"do_sample": True, "top_p": 0.8, "temperature": 0.8}


class ConversationTooLongError(ValueError):
    """A conversation leaves no room for an answer."""


class Round:
    """A question of a conversation, ready to be answered.

    Args:
        tokenizer, query, history, role: as of `GLMForCausalLM.chat`.
        options: of generation, which replace the defaults of the released models.

    Attributes:
        ids: the prompt.
        options: of `generate` and `stream`, complete.
        room: tokens between the prompt and `max_length`.
        cut: whether the answer had no end when it reached the most tokens allowed; known when it is complete.
        stopped: whether the caller of `stream` has stopped it.

    Raises:
        ConversationTooLongError: the prompt leaves no room for an answer.
        ValueError: arguments that the prompt template has no place for, or several answers.
    """

    def __init__(
        self,
        model: GLMForCausalLM,
        tokenizer: SentencePieceTokenizer,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        options: Mapping[str, Any],
    ) -> None:
        if not isinstance(tokenizer, SentencePieceTokenizer):
            raise ValueError(f"tokenizer: {type(tokenizer).__name__}: give a ChatGLM2Tokenizer or ChatGLM3Tokenizer")
        self._model, self._tokenizer = model, tokenizer
        self._query, self._history, self._role = query, history, role
        self.ids = tokenizer.build_chat_input(query, history, role)["input_ids"]
        self.options = self._complete(options)
        self.cut = self.stopped = False
        if self.options.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: a conversation has one answer; call generate for several")

    def _complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        longest = self._model.config.seq_length
        # Options of sampling would be reported as useless beside greedy decoding or beams.
        samples = given.get("do_sample", given.get("num_beams", 1) == 1)
        options = {"max_length": min(_MAX_LENGTH, longest), **(_SAMPLING if samples else {}), **given}
        limit = options["max_length"]
        if not isinstance(limit, int):
            raise ValueError(f"max_length = {limit!r}: give a number of tokens")
        self.room = limit - len(self.ids)
        if self.room < 1:
            raise ConversationTooLongError(
                f"max_length = {limit}: the conversation has {len(self.ids)} tokens, which leaves no room for an "
                f"answer; shorten the history, or raise max_length (the network has {longest})"
            )
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = self.room
        if options.get("eos_token_id") is None:
            options["eos_token_id"] = self._tokenizer.stop_token_ids
        return options

    def answer(self) -> tuple[Any, list[Any]]:
        """The whole answer and the history with it."""
        sequence = self._model.generate(self.ids, **self.options)[0]
        return self._end(sequence[len(self.ids) :])

    def stream(self, stop: Callable[[], bool] = lambda: False) -> Generator[tuple[Any, list[Any]], None, None]:
        """The text so far and the history with it, whenever there is more text; at the end what `answer` returns.

        A tool call appears at the end only. `stop` is asked after each token; when it says so, the stream ends there.
        """
        decoder = IncrementalDecoder(self._tokenizer)
        parser = self._tokenizer.answer_parser(self._tokenizer.tools_of(self._history))
        _, (*earlier, turn) = self._end([])
        shown, ids = "", list[int]()
        with closing(self._model.stream(self.ids, **self.options)) as steps:  # type: ignore[type-var]
            for tokens in steps:
                ids.append(int(tokens[0]))
                pieces = [decoder.push(token) for token in self._known(ids[-1:])]
                new = "".join(part.text for part in parser.push("".join(pieces)) if isinstance(part, Text))
                if new:
                    shown += new
                    last = (turn[0], shown) if isinstance(turn, tuple) else {**turn, "content": shown}
                    yield shown, [*earlier, last]
                if stop():
                    self.stopped = True
                    return
        yield self._end(ids)

    def _end(self, ids: Sequence[int]) -> tuple[Any, list[Any]]:
        self.cut = bool(ids) and ids[-1] not in self._stop
        output = self._tokenizer.decode(self._known(ids))
        return self._tokenizer.add_answer(output, self._query, self._history, self._role)

    def _known(self, ids: Sequence[int]) -> list[int]:
        """Ids that have text: not a stop id, nor one of the padding of the vocabulary of an untrained network."""
        return [token for token in ids if token < self._tokenizer.vocab_size and token not in self._stop]

    @property
    def _stop(self) -> Sequence[int]:
        ends = self.options["eos_token_id"]
        return ends if isinstance(ends, (list, tuple)) else [ends]
