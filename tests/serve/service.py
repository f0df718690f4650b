"""An engine over a decoder without a network, and a server on a free port for clients that speak over a socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from serve.fakes import FakeDecoder

from glm_ms.families import family_of
from glm_ms.serve.app import create_app
from glm_ms.serve.engine import Engine
from glm_ms.serve.scheduler import Scheduler
from glm_ms.tokenizer import SentencePieceTokenizer

PADDING = 8  # ids of the network beyond those of the tokenizer


def make_engine(
    tokenizer: SentencePieceTokenizer, decoder: FakeDecoder | None = None, max_queue: int = 64, **options: Any
) -> Engine:
    """An engine whose scheduler runs. Close the scheduler at the end, as `running_engine` does."""
    vocab_size = tokenizer.vocab_size + PADDING
    decoder = decoder or FakeDecoder(vocab_size, slots=4, capacity=128)
    scheduler = Scheduler(decoder, tokenizer, max_queue)
    scheduler.start()
    family = family_of(tokenizer)
    given = {"seconds": 60.0, **options}
    return Engine(scheduler, tokenizer, family, "tiny", decoder.capacity, vocab_size, decoder.slots, **given)


@contextmanager
def running_engine(tokenizer: SentencePieceTokenizer, *arguments: Any, **options: Any) -> Iterator[Engine]:
    """`make_engine` until the block ends."""
    engine = make_engine(tokenizer, *arguments, **options)
    try:
        yield engine
    finally:
        engine.scheduler.close()


@contextmanager
def client_of(engine: Engine | None, **options: Any) -> Iterator[httpx.Client]:
    """A client of `running_server`."""
    with running_server(engine, **options) as url, httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        yield client


@contextmanager
def running_server(engine: Engine | None, **options: Any) -> Iterator[str]:
    """The address, `http://127.0.0.1:PORT`, of a server of `create_app(engine, **options)` in a thread."""
    bound = socket.socket(proto=socket.IPPROTO_TCP)  # with it asyncio sends small parts of an answer at once
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, **options), log_level="error", lifespan="off"))
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns as soon as a condition is true; AssertionError if it is not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.002)
