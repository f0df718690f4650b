"""ChatGLM2: a prompt template of numbered rounds in plain text, without role tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_ms.tokenizer.answers import replace_training_date
from glm_ms.tokenizer.base import (
    OF_CHATGLM3,
    PLAIN,
    SentencePieceTokenizer,
    checked,
    history_items,
    sequence_dict,
    tell_unknown_keys,
)

_ROUND = "[Round {}]\n\n问：{}\n\n答："
_ROLE_TOKEN = re.compile(r"\s*<\|(system|user|assistant|observation)\|>")


class ChatGLM2Tokenizer(SentencePieceTokenizer):
    """Tokenizer of ChatGLM2-6B (CodeGeeX2 shares it)."""

    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    # Text of `build_prompt` has the template already, too.
    template_opening = re.compile(r"\[gMASK\] *sop|(?=\[Round \d+\](\n|\\n)*问：)")

    def _special_piece(self, index: int) -> str:
        if index >= self.vocab_size:
            raise IndexError(f"token id {index} is beyond the vocabulary of {self.vocab_size} ids")
        return ""

    def build_prompt(self, query: str, history: Sequence[Any] | None = None) -> str:
        """Text of a conversation; arguments and errors are those of `build_chat_input`."""
        rounds = [*_as_rounds(history), (checked(query), "")]
        return "\n\n".join(
            _ROUND.format(number, question) + answer for number, (question, answer) in enumerate(rounds, start=1)
        )

    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> dict[str, list[int]]:
        """Ids of `build_prompt`.

        Args:
            query: the new question.
            history: (question, answer) pairs, or messages `{"role": "user"|"assistant", "content": text}` in turn.
            role: "user", the only one this model knows.

        Raises:
            TypeError: `query` is not a string.
            ValueError: another role, or a history that is not question and answer in turn.
        """
        if self.template == PLAIN:
            return self._plain_input(query, history, role)
        if role != "user":
            raise ValueError(f"role = {role!r}: ChatGLM2 knows questions of the user only")
        return sequence_dict(self.encode(self.build_prompt(query, history)))

    def build_stream_input(self, query: str, history: Sequence[Any] | None = None) -> dict[str, list[int]]:
        """Ids that continue a conversation whose earlier rounds are in the key-value cache.

        With a history these are the line breaks after the last answer and the new round, without `[gMASK] sop`;
        positions count from 0. Without one it is `build_chat_input`.
        """
        rounds = _as_rounds(history)
        if not rounds:
            return self.build_chat_input(query)
        ids = self.encode("\n\n" + _ROUND.format(len(rounds) + 1, checked(query)), add_special_tokens=False)
        # In the middle of a text the vocabulary adds no leading space.
        if ids and self.sp.IdToPiece(ids[0]) == "▁":
            ids = ids[1:]
        return sequence_dict(ids)

    def add_answer(self, output: str, query: str, history: Sequence[Any] | None, role: str) -> tuple[str, list[Any]]:
        """The answer, and the history with it: messages if there are messages, otherwise (question, answer) pairs."""
        answer, earlier = self.process_response(output), list(history or [])
        if any(isinstance(item, Mapping) for item in earlier):
            turn = [{"role": role, "content": query}, {"role": "assistant", "content": answer}]
            return answer, [*copy.deepcopy(earlier), *turn]
        return answer, [*copy.deepcopy(earlier), (query, answer)]

    def process_response(self, output: str) -> str:
        """The answer as shown to the user."""
        return replace_training_date(output.strip())

    def _encode_template_body(self, body: str) -> list[int]:
        if _ROLE_TOKEN.match(body):
            raise ValueError(
                f"{body[:40]!r}: role tokens belong to ChatGLM3; ChatGLM2 text is '[gMASK]sop[Round 1]\\n\\n问：...'"
            )
        return self._piece_ids(body)


def _as_rounds(history: Any) -> list[tuple[str, str]]:
    """(question, answer) pairs of pairs or of messages.

    Raises:
        ValueError: anything else, for example messages of ChatGLM3 with another role.
    """
    history = history_items(history, "(question, answer) pairs or of messages")
    if not any(isinstance(item, Mapping) for item in history):
        return [_pair(item) for item in history]
    rounds = []
    for i in range(0, len(history), 2):
        turn = history[i : i + 2]
        roles = [item.get("role") if isinstance(item, Mapping) else None for item in turn]
        if roles != ["user", "assistant"]:
            raise ValueError(f"history[{i}:{i + 2}] has roles {roles}: ChatGLM2 needs user and assistant in turn")
        unknown = next((key for item in turn for key in OF_CHATGLM3 if item.get(key)), None)
        if unknown is not None:
            raise ValueError(f"history[{i}:{i + 2}]: {unknown!r} is not known to ChatGLM2, which has no tools")
        for number, item in enumerate(turn, start=i):
            tell_unknown_keys(item, ("role", "content", *OF_CHATGLM3), f"history[{number}]")
        rounds.append(_pair([item.get("content") for item in turn]))
    return rounds


def _pair(item: Any) -> tuple[str, str]:
    if not isinstance(item, (list, tuple)) or len(item) != 2 or not all(isinstance(text, str) for text in item):
        raise ValueError(f"history item {item!r:.80}: must be a (question, answer) pair of strings")
    return item[0], item[1]
