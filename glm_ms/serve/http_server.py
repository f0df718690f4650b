"""The process that serves HTTP: it loads the model while the port is open, and ends in order."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Callable

import uvicorn
from fastapi import FastAPI

if TYPE_CHECKING:
    from glm_ms.serve.engine import Engine

_LOG = logging.getLogger(__name__)
_FORCED = 5  # seconds in which connections end after their answers have been cancelled


class Server(uvicorn.Server):
    """Uvicorn with an engine that is loaded while the port is open, and with an orderly end.

    Args:
        app: of `create_app`; its `state.engine` is set when the engine is loaded.
        bound: a listening socket.
        drain_seconds: most time for answers that have begun, after the first signal.
        say: takes lines for the user.

    Attributes:
        failure: the error that has ended the scheduler, and with it the server.
    """

    failure: Exception | None = None

    def __init__(self, app: FastAPI, bound: socket.socket, drain_seconds: float, say: Callable[[str], None]) -> None:
        limit = int(drain_seconds) + _FORCED
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=limit, lifespan="off"))
        self.app, self.bound, self.drain_seconds, self.say = app, bound, drain_seconds, say
        self.url = address(bound)
        self._signal: int | None = None
        self._signals = 0
        self._error: BaseException | None = None  # of loading

    def serve_engine(self, load: Callable[[], Engine]) -> None:
        """Serves until a signal comes, the scheduler fails, or `should_exit` is set. Raises what `load` raises."""
        loader = threading.Thread(target=self._load, args=(load,), name="glm_ms loader", daemon=True)
        loader.start()
        self.run(sockets=[self.bound])
        if self._error is not None:
            raise self._error
        engine = self.app.state.engine
        if engine is None:  # libraries that import or compile cannot be interrupted
            sys.stdout.flush()
            os._exit(128 + (self._signal or signal.SIGTERM))
        engine.scheduler.close()

    def _load(self, load: Callable[[], Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:  # the main thread raises it again
            self._error, self.should_exit = error, True
            return
        engine.scheduler.on_failure = self._fail
        self.app.state.engine = engine
        names = ", ".join([engine.name, *engine.adapters])
        self.say(f"{self.url}/v1 is ready; models: {names}; up to {engine.context} tokens of prompt and answer")

    def _fail(self, error: Exception) -> None:
        """Ends the server, so that who watches the process starts it again: nothing here repairs a decoder."""
        _LOG.critical("the scheduler has failed; the server ends", exc_info=error)
        self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal ends the server after its answers, a second one ends the answers, too.

        A third one does not wait for clients to read the ends of their answers.
        """
        self._signals += 1
        engine = self.app.state.engine
        if self._signals > (1 if engine is None else 2):
            self.force_exit = True
            return
        self.should_exit, self._signal = True, sig
        if engine is not None:
            engine.stopping = True
            seconds = self.drain_seconds if self._signals == 1 else 0.0
            threading.Thread(target=engine.scheduler.drain, args=(seconds,), daemon=True).start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the block runs. That of Uvicorn raises them again at the end, which ends the process
        with the status of a failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM end the process while the block imports: libraries abort when an import is interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def address(bound: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
