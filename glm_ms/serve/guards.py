"""What is checked before the application sees a request: its host, its key, and the bounds of its body."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_ms.serve.auth import Keys
from glm_ms.serve.errors import CLIENT_LEFT, APIError, error_response
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import parse_json

MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 60.0  # from the first to the last byte of a body


class CheckHost:
    """ASGI middleware: requests name this machine, or one of some hosts, in their Host header.

    A web page whose name its owner lets point to 127.0.0.1 (DNS rebinding) may read all answers of a server there: for
    the browser both are one origin. Its requests still have the name of the page.

    Args:
        allowed: hosts besides `localhost` and the loopback addresses, in lower case.
        public: paths that are not checked.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], public: Collection[str]) -> None:
        self.app, self.allowed, self.public = app, frozenset(allowed), frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.public:
            await self.app(scope, receive, send)
            return
        host = host_name(Headers(scope=scope).get("host", ""))
        if not host or host in self.allowed or _is_this_machine(host):
            await self.app(scope, receive, send)
            return
        message = (
            f"Host {host[:100]!r}: this server does not answer for it; ask for 127.0.0.1 or localhost, or start the "
            "server with --allowed-hosts and this name"
        )
        await error_response(APIError(403, message, code="foreign_host"), scope["path"])(scope, receive, send)


def host_name(header: str) -> str:
    """The host of a Host header, without port, brackets and the dot at the end, in lower case."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].rstrip(".")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")  # RFC 6761: never of another machine


class RequireKey:
    """ASGI middleware: requests need a key, as `Authorization: Bearer KEY` or `x-api-key: KEY`.

    Args:
        public: paths that need none.
    """

    def __init__(self, app: ASGIApp, keys: Keys, public: Collection[str]) -> None:
        self.app, self.keys, self.public = app, keys, frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.keys or scope["path"] in self.public:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self.keys.open_with(given):
            await self.app(scope, receive, send)
            return
        message = "wrong key" if given else "no key: send the header Authorization: Bearer KEY"
        error = APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error_response(error, scope["path"])(scope, receive, send)


class CheckBody:
    """ASGI middleware: the body of a POST request is one JSON value in UTF-8, of bounded size, depth and time.

    A key may be given once, numbers are finite, and text has whole characters. Requests with another content type are
    refused, because a browser sends such ones for any web page without asking the server first.
    """

    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY, seconds: float = BODY_SECONDS) -> None:
        self.app, self.max_body, self.seconds = app, max_body, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            _check_headers(Headers(scope=scope))
            body = await asyncio.wait_for(self._read(receive, Headers(scope=scope)), self.seconds)
            check_json(body)
        except APIError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        except asyncio.TimeoutError:
            late = APIError(408, f"body: did not arrive within {self.seconds:g} seconds")
            await error_response(late, scope["path"])(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive, headers: Headers) -> bytes:
        too_large = APIError(
            413, f"body: more than {self.max_body} bytes; shorten the conversation or the prompt", code="body_too_large"
        )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise APIError(CLIENT_LEFT, "the client left")
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self.max_body:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _check_headers(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"content-type: {kind or 'missing'}; send Content-Type: application/json")
    coding = headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise APIError(415, f"content-encoding: {coding}: not supported; send the body uncompressed")


def check_json(body: bytes) -> Any:
    """The value of a body; APIError if it is not one JSON value as `CheckBody` says."""
    try:
        value = parse_json(body.decode("utf-8"), "body")
        # What is written again as strict JSON in UTF-8 has finite numbers and no halves of characters.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise APIError(400, f"body: not UTF-8 (byte {error.start})") from None
    except FileError as error:
        raise APIError(400, str(error)) from None
    except UnicodeEncodeError:
        raise APIError(400, "body: a text has half of a surrogate pair; remove it") from None
    except ValueError:
        raise APIError(400, "body: NaN and Infinity are not JSON; give finite numbers") from None
    return value
