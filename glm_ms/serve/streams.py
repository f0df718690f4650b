"""Answers on their way to a client: server-sent events, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm_ms.serve.errors import CLIENT_LEFT, APIError

T = TypeVar("T")
DONE = "[DONE]"  # the last event of OpenAI's streams
_COMMENT_SECONDS = 15.0  # proxies close connections on which nothing happens
_COMMENT = b": waiting\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event with a JSON value or a word; `name` is its type."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


class EventStream(Response):
    """A response of server-sent events.

    When the client leaves, also while the next event is awaited, `source` is closed at once: its `finally` blocks run.

    Args:
        source: yields the bytes of `event`. An APIError that it raises becomes the last event but `DONE`.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(client_leaves(receive))
        upcoming: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                upcoming = asyncio.ensure_future(self.source.__anext__())
                while not upcoming.done():
                    both = {upcoming, leaving}
                    await asyncio.wait(both, timeout=_COMMENT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    if leaving.done():
                        return
                    if not upcoming.done():
                        await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                try:
                    body = upcoming.result()
                except StopAsyncIteration:
                    break
                except APIError as error:
                    body = event(error.body()) + event(DONE)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    break
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            waiting = [task for task in (leaving, upcoming) if task is not None]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await self.source.aclose()


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several generators as they come, each with the number of its generator.

    Closing this one closes all of them; an error of one of them does, too.
    """
    upcoming = {asyncio.ensure_future(source.__anext__()): number for number, source in enumerate(sources)}
    try:
        while upcoming:
            done, _ = await asyncio.wait(upcoming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=upcoming.__getitem__):
                number = upcoming.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield number, item
                upcoming[asyncio.ensure_future(sources[number].__anext__())] = number
    finally:
        for task in upcoming:
            task.cancel()
        await asyncio.gather(*upcoming, return_exceptions=True)
        for source in sources:
            await source.aclose()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves.

    Args:
        receive: of the request, whose body has been read.

    Raises:
        APIError: the client has left; nobody reads the response.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(CLIENT_LEFT, "the client left")
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def client_leaves(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
