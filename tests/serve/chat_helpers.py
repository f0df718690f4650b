"""A network that says what a test wants, for tests of the chat interfaces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from serve.fakes import FakeDecoder
from serve.service import PADDING, running_engine

from glm_ms.serve.app import create_app
from glm_ms.tokenizer import SentencePieceTokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def called(name: str, arguments: str) -> str:
    """A call as ChatGLM3 writes it: a message of an answer."""
    return f"{name}\n ```python\ntool_call({arguments})\n```"


class Speaker(FakeDecoder):
    """A network that gives the same answer to every prompt. A grammar, or a bias, can overrule it.

    Attributes:
        prompts: ids of the prompts so far.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, capacity: int = 4096, slots: int = 4) -> None:
        super().__init__(tokenizer.vocab_size + PADDING, slots=slots, capacity=capacity, chunk=512)
        self.tokenizer = tokenizer
        self.answer: list[int] = []
        self.prompts: list[list[int]] = []

    def say(self, *messages: str, end: str | None = "<eos>") -> list[int]:
        """From now on the answer is these messages, then `end`. A text begins with an empty line in ChatGLM3's form."""
        ids: list[int] = []
        for number, message in enumerate(messages):
            ids += [self.tokenizer.get_command("<|assistant|>")] if number else []
            ids += self.tokenizer.encode(message, add_special_tokens=False)
        self.answer = ids if end is None else [*ids, self.tokenizer.get_command(end)]
        return self.answer

    @property
    def prompt(self) -> str:
        """Text of the last prompt."""
        return self.tokenizer.decode(self.prompts[-1])

    def open(self, ids: Sequence[int], *arguments: Any, **options: Any) -> int:
        self.prompts.append(list(ids))
        return super().open(ids, *arguments, **options)

    def prefill(self, slot: int, all_logits: bool = False) -> np.ndarray | None:
        scores = super().prefill(slot, all_logits)
        return scores if scores is None else self._said(slot)

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        super().step(slots, tokens)
        return np.stack([self._said(slot) for slot in slots])

    def answer_of(self, slot: int) -> list[int]:
        """The answer to the prompt in a slot."""
        return self.answer

    def _said(self, slot: int) -> np.ndarray:
        answer, place = self.answer_of(slot), len(self.running[slot].generated)
        scores = np.linspace(0, -1, self.vocab_size, dtype=np.float32)
        scores[answer[min(place, len(answer) - 1)]] += 100
        return scores


@contextmanager
def chat_client(tokenizer: SentencePieceTokenizer, **options: Any) -> Iterator[tuple[TestClient, Speaker]]:
    """A client of a server over a `Speaker`."""
    speaker = Speaker(tokenizer)
    with running_engine(tokenizer, speaker, **options) as engine:
        yield TestClient(create_app(engine), raise_server_exceptions=False), speaker


def events_of(response: Any) -> list[tuple[str | None, Any]]:
    """Name and value of each event of a stream; a word as it is."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name = None
        for line in block.split("\n"):
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            else:
                assert kind == "data"
                found.append((name, value if value.startswith("[") else json.loads(value)))
    return found
