"""What a client of the scheduler asks for and gets: `Job`, `Answer`, `Event`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Callable, Protocol

import numpy as np

from glm_ms.generation.config import GenerationConfig


class Guide(Protocol):
    """A grammar of one choice."""

    def mask(self) -> np.ndarray | None:
        """Tokens that may follow, bool [V], an end token among them where the text may end; None: all."""

    def accept(self, token: int) -> None:
        """Adds the token that was chosen; not called for end tokens."""

    def finished(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True)
class Job:
    """A prompt and how to continue it.

    Raises:
        ValueError: a value that can never work; it names the field.
    """

    ids: Sequence[int]  # of the prompt
    config: GenerationConfig  # `num_return_sequences` choices; `eos_token_id` ends one; no beam search
    adapter: str | None = None  # name of a loaded adapter; None: the base model
    stop: tuple[str, ...] = ()  # texts that end a choice, whose text is cut before them
    include_stop: bool = False  # cut after them instead
    logprobs: int | None = None  # log-probabilities of tokens, and of so many likeliest alternatives; None: neither
    prompt_logprobs: bool = False  # the same for the prompt
    guide: Callable[[], Guide] | None = None  # makes the grammar of each choice
    seconds: float | None = None  # time limit from `submit` on, waiting included

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop = {self.stop!r:.80}: expected texts, none of them empty")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs = {self.logprobs}: must be at least 0")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds = {self.seconds}: must be above 0")


@dataclass(frozen=True)
class TokenScore:
    """A token with its log-probability by the unmodified scores of the network, float32.

    `logprob` is nan and `top` empty where the job does not ask for them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, log-probability) of the likeliest tokens, best first


@dataclass(frozen=True)
class Event:
    """News of one choice.

    Over the events of a choice, `text` adds up to its text and `tokens` to all that were generated, an end token
    included. Text never has half of a character, nor what may become a stop string.
    """

    choice: int
    text: str
    tokens: tuple[TokenScore, ...]
    finish: str | None = None  # "stop", "length", "cancelled" or "timeout" in the last event of a choice
    stop_reason: str | int | None = None  # with "stop": the stop string or end token; None: the grammar is complete


class Answer:
    """What `Scheduler.submit` returns. One thread or task reads its events.

    Attributes:
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them were found computed; set before the first event.
        queue_seconds: how long the job waited for slots; None while it waits.
        prompt_scores: one for each token of the prompt but the first, set before the first event; None if the job
            does not ask for them.
    """

    def __init__(self, prompt_tokens: int, cancel: Callable[[Answer], None]) -> None:
        self.prompt_tokens, self.cached_tokens = prompt_tokens, 0
        self.queue_seconds: float | None = None
        self.prompt_scores: list[TokenScore] | None = None
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._ended = False
        self._error: Exception | None = None

    def events(self) -> Iterator[Event]:
        """Yields events as they come, and ends after the last choice. A caller that leaves before cancels the job.

        Raises:
            Exception: what made the job fail.
        """
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._events or self._ended)
                    events, ended = self._take()
                yield from events
                if ended:
                    return
        finally:
            self.cancel()

    async def aevents(self) -> AsyncIterator[Event]:
        """`events` for asyncio."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        try:
            while True:
                arrived.clear()
                with self._changed:
                    events, ended = self._take()
                for event in events:
                    yield event
                if ended:
                    return
                if not events:
                    await arrived.wait()
        finally:
            self._wake = None
            self.cancel()

    def cancel(self) -> None:
        """Ends what still runs, with "cancelled"; its slots are free before the next step. Any thread may call it."""
        if not self._ended:
            self._cancel(self)

    def put(self, event: Event) -> None:
        """Adds an event; for the scheduler."""
        with self._changed:
            self._events.append(event)
        self._notify()

    def close(self, error: Exception | None = None) -> None:
        """No event follows; for the scheduler."""
        with self._changed:
            self._ended, self._error = True, error
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        wake = self._wake
        if wake is not None:
            wake()

    def _take(self) -> tuple[list[Event], bool]:
        """The events that wait, and whether they are the last ones; raises the error when none waits."""
        events, ended = list(self._events), self._ended
        self._events.clear()
        if ended and not events and self._error is not None:
            raise self._error
        return events, ended and self._error is None
