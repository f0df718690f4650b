"""A server with the chat page and a scripted `/v1/chat/completions`: what the page must get along with.

The last message of a request says what the answer is, see `SCRIPTS`. The stream is cut into pieces of a few bytes, in
the middle of characters as well.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from glm_ms.serve.web_page import ChatPage

KEY = "secret-key-of-the-tests"
EMOJI = "好的👩‍👩‍👧‍👦，今天很热🌶️。"
CODE = "Run this:\n```python\nprint('<b>hi</b>')\n```\nand `more`."
HTML = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
CALLS = [("get_weather", '{"city": "北京"}'), ("get_time", '{"zone": "Asia/Shanghai"}')]
NORMAL = "The answer to «{}» is 42."


class Api:
    """The server, in a thread of its own.

    Attributes:
        requests: bodies of the chat completions, with the headers `authorization` and `x-session-id`.
        left: number of streams that the client has closed early.
        gate: a stream that waits for it ("wait") continues once it is set.
    """

    def __init__(self, key: str | None = None, port: int = 0) -> None:
        self.key, self.requests, self.left = key, [], 0
        self.busy, self.gate = 0, threading.Event()
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self._server = uvicorn.Server(
            uvicorn.Config(ChatPage(Starlette(routes=routes)), log_level="error", lifespan="off")
        )
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        """Ends the server; open streams are cut."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        assert not self._thread.is_alive()

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "wrong key")

    async def _models(self, request: Request) -> Response:
        names = [{"id": name, "object": "model"} for name in ("glm3", "adverts")]
        return self._refused(request) or JSONResponse({"object": "list", "data": names})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        seen = {name: request.headers.get(name) for name in ("authorization", "x-session-id")}
        self.requests.append({**body, **seen})
        refused = self._refused(request)
        if refused is not None:
            return refused
        text = str(body["messages"][-1]["content"])
        if self.busy:
            self.busy -= 1
            return _error(429, "the queue is full", {"Retry-After": "1"})
        if text == "error":
            return _error(400, "the prompt is too long")
        return StreamingResponse(self._pieces(text), media_type="text/event-stream")

    async def _pieces(self, text: str) -> AsyncIterator[bytes]:
        """The bytes of the events, 7 at a time."""
        try:
            async for event in self._events(text):
                for start in range(0, len(event), 7):
                    yield event[start : start + 7]
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def _events(self, text: str) -> AsyncIterator[bytes]:
        yield _chunk({"role": "assistant", "content": ""})
        if text == "call":
            for delta in _call_deltas():
                yield _chunk(delta)
            yield _chunk({}, "tool_calls")
        elif text == "cut":
            yield _chunk({"content": "half an ans"})
            return
        else:
            script = SCRIPTS.get(text, NORMAL.format(text))
            for character in script:
                yield _chunk({"content": character})
                await asyncio.sleep(0.005)
            if text == "wait":
                while not self.gate.is_set():
                    await asyncio.sleep(0.01)
                yield _chunk({"content": " then"})
            yield _chunk({}, "length" if text == "short" else "stop")
        yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 21, "total_tokens": 24}})
        yield b"data: [DONE]\r\n\r\n"


SCRIPTS = {
    "emoji": EMOJI,
    "code": CODE,
    "html": HTML,
    "wait": "first",
    "short": "It ends in the middle of",
    "long": "word " * 5000,
}


def _call_deltas() -> list[dict[str, Any]]:
    """Each call: its name, then its arguments in two parts."""
    deltas = []
    for index, (name, arguments) in enumerate(CALLS):
        first = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [{"index": index, "function": {"arguments": part}} for part in (arguments[:9], arguments[9:])]
        deltas += [{"tool_calls": [part]} for part in (first, *parts)]
    return deltas


def _chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _event(data: dict[str, Any]) -> bytes:
    return f": comment\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "error", "code": None}}, status, headers)


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Returns as soon as the condition is true; TimeoutError after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not true after {seconds} seconds")
        time.sleep(0.01)
