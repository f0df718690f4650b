"""What every door of the server shares: `Engine`, a running model with its names."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from glm_ms.families import Family
from glm_ms.generation.config import GenerationConfig
from glm_ms.peft.adapter import StoredAdapter
from glm_ms.serve.answer import Answer, Event, Job
from glm_ms.serve.errors import APIError
from glm_ms.serve.guides import Guides
from glm_ms.serve.metrics import Metrics, Watch
from glm_ms.serve.scheduler import QueueFull, Scheduler, Stopped
from glm_ms.storage.suggest import did_you_mean
from glm_ms.tokenizer import SentencePieceTokenizer

_LOG = logging.getLogger(__name__)
_RETRY_SECONDS = 5  # until a server that starts or stops is asked again
# `Event.finish` -> `finish_reason` of OpenAI, which has no word for a time limit.
FINISH_REASONS = {"stop": "stop", "length": "length", "timeout": "length"}


class AdapterDecoder(Protocol):
    """What the server needs of `glm_ms.generation.paged.PagedDecoder` besides what the scheduler needs."""

    def load_adapter(self, name: str, stored: StoredAdapter) -> None:
        """Serves an adapter from now on; AdapterError if it does not fit."""

    def unload_adapter(self, name: str) -> None:
        """Takes no new sequences for an adapter."""


@dataclass
class Engine:
    """A model that answers, with its tokenizer and names.

    Attributes:
        scheduler: runs jobs.
        tokenizer, family: of the model.
        name: of the model without an adapter, as clients write it.
        context: most tokens of a prompt and its answer together.
        vocab_size: of the network; at least that of the tokenizer.
        choices: most answers to one prompt at a time.
        prompt_lookup_num_tokens: of every answer, see `GenerationConfig`.
        seconds: after so many an answer ends as it is; None: no limit.
        adapters: name of an adapter, as clients write it as the model -> where it came from.
        created: time of the start, for lists of models.
        decoder: loads and unloads adapters; None: there are none.
        base: where the weights came from; None: not from a path.
        metrics: numbers for /metrics.
    """

    scheduler: Scheduler
    tokenizer: SentencePieceTokenizer
    family: Family
    name: str
    context: int
    vocab_size: int
    choices: int
    seconds: float | None = None
    prompt_lookup_num_tokens: int = GenerationConfig.prompt_lookup_num_tokens
    adapters: dict[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    decoder: AdapterDecoder | None = None
    base: Path | None = None
    stopping: bool = False  # running answers end, new ones are refused

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.name, self.scheduler)
        self._bytes: dict[int, bytes] = {}
        self.guides = Guides(self.tokenizer, self.vocab_size)

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request means by its `model`; None: the model without an adapter.

        Raises:
            APIError: 404, there is no such model.
        """
        if model is None or model == self.name:
            return None
        if model in self.adapters:
            return model
        known = [self.name, *self.adapters]
        hint = did_you_mean(model, known, f"; known: {', '.join(known[:10])}")
        raise APIError(404, f"model {model[:100]!r} does not exist{hint}", "model", "model_not_found")

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, with `[gMASK] sop` before it if `special`. Other requests continue."""
        return await run_in_threadpool(self.tokenizer.encode, text, add_special_tokens=special)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises APIError, 400, if an id is outside the vocabulary of the network."""
        for token in ids:
            if token >= self.vocab_size:
                raise APIError(400, f"{param}: {token}: the vocabulary has ids 0..{self.vocab_size - 1}", param)

    def answer_room(self, prompt: int, wanted: int | None, param: str = "max_tokens") -> int:
        """Most tokens of an answer to a prompt of `prompt` tokens: `wanted`, or all that the context has room for.

        Raises:
            APIError: 400, they do not fit.
        """
        if prompt + (wanted or 1) <= self.context:
            return wanted or self.context - prompt
        asked = "" if wanted is None else f" and {wanted} for the answer ({param})"
        message = f"the prompt has {prompt} tokens{asked}, but prompt and answer have at most {self.context} together"
        raise APIError(400, f"{message}; shorten the prompt or lower {param}", param, "context_length_exceeded")

    def submit(self, job: Job) -> Answer:
        """Hands a job to the scheduler.

        Raises:
            APIError: 429, the queue is full; 503, the server stops; 400, the job can never run.
        """
        if self.stopping:
            raise stopping()
        try:
            return self.scheduler.submit(job)
        except QueueFull as error:
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            raise APIError(429, str(error), code="queue_full", headers=headers) from None
        except Stopped:
            self.check_running()
            raise stopping() from None
        except ValueError as error:
            raise APIError(400, str(error)) from None

    def check_running(self) -> None:
        """Raises APIError, 503, if the server takes no requests: it stops, or it has failed."""
        if self.stopping:
            raise stopping()
        if not self.scheduler.alive:
            raise APIError(503, "the server has failed; its log has the reason; restart it", code="failed")

    def submit_all(self, jobs: Sequence[Job]) -> list[Answer]:
        """Hands several jobs to the scheduler, all or none; errors as of `submit`."""
        answers: list[Answer] = []
        try:
            for job in jobs:
                answers.append(self.submit(job))
        except APIError:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    async def events(self, answer: Answer) -> AsyncGenerator[Event, None]:
        """The events of an answer. Closing the generator frees what the answer uses.

        Raises:
            APIError: 503, the server has stopped before the answer was complete; 400, the job cannot run; 500,
                computing it has failed.
        """
        watch = Watch(self.metrics, answer)
        try:
            async for event in answer.aevents():
                watch.see(event)
                if event.finish == "cancelled":
                    raise stopping()
                yield event
        except ValueError as error:  # of this request alone: an adapter that has been unloaded meanwhile, no pages
            raise APIError(400, str(error)) from error
        except APIError:
            raise
        except Exception as error:
            _LOG.error("computing an answer has failed", exc_info=error)
            raise APIError(500, f"computing the answer has failed: {error}") from error
        finally:
            answer.cancel()
            watch.end()

    async def collect(self, answers: Sequence[Answer]) -> list[list[Event]]:
        """All events of several answers. Cancelling the caller cancels the answers.

        Raises:
            APIError: as of `events`.
        """

        async def all_of(answer: Answer) -> list[Event]:
            return [event async for event in self.events(answer)]

        tasks = [asyncio.ensure_future(all_of(answer)) for answer in answers]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def token_bytes(self, token: int) -> bytes:
        """The text of a token in UTF-8, with its leading space; half of a character if the token has no more of it.

        A special token is its name, an id that the tokenizer lacks is empty.
        """
        if token not in self._bytes:
            self._bytes[token] = _token_bytes(self.tokenizer, token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        r"""`token_bytes` as text; bytes that are no whole character are written `bytes:\xe4`, as OpenAI does."""
        content = self.token_bytes(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _token_bytes(tokenizer: SentencePieceTokenizer, token: int) -> bytes:
    byte = tokenizer.byte_value(token)
    if byte is not None:
        return bytes([byte])
    pieces = tokenizer.sp.GetPieceSize()
    if token < pieces:
        return str(tokenizer.sp.IdToPiece(token)).replace("▁", " ").encode()
    names = tokenizer.special_tokens
    return names[token - pieces].encode() if token - pieces < len(names) else b""


def engine_of(request: Request) -> Engine:
    """The engine of the application, for `Depends`.

    Raises:
        APIError: 503, it is not there yet.
    """
    engine: Any = request.app.state.engine
    if engine is None:
        raise APIError(503, "the model is being loaded", code="not_ready", headers={"Retry-After": str(_RETRY_SECONDS)})
    return engine


def stopping() -> APIError:
    """The error of requests that come, or do not end, while the server stops."""
    return APIError(503, "the server is stopping", code="stopping", headers={"Retry-After": str(_RETRY_SECONDS)})
