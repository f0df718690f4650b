"""The chat page: static files of the package, which a browser gets from the server that answers its questions.

The page loads nothing from elsewhere, and its content security policy forbids it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

FOLDER = Path(__file__).resolve().parent / "web"
INDEX = "index.html"
# Not from the module mimetypes: it reads tables of the system, which may call a script text/plain.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles of this server only; no inline code, no frames, no forms to elsewhere, no HTML from text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time; the ETag saves the transfer
}


class ChatPage:
    """ASGI middleware: answers `GET /` with the page and `GET /web/NAME` with its files; the rest is for `app`.

    Put it in front of the check of keys: the files have no secrets, and a browser that fetches a page has no key yet.
    The user types it into the page. The files are read once.

    Raises:
        FileNotFoundError: the installation lacks the files.
    """

    def __init__(self, app: ASGIApp, folder: Path = FOLDER) -> None:
        self.app = app
        names = [path for path in sorted(folder.glob("*")) if path.suffix in TYPES]
        self._files = {"/" if path.name == INDEX else f"/web/{path.name}": _File(path) for path in names}
        if "/" not in self._files:
            raise FileNotFoundError(f"{folder / INDEX}: no such file; reinstall the package")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        file = self._files.get(scope.get("path", ""))
        if file is None or scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        await file.response(Headers(scope=scope), scope["method"])(scope, receive, send)


class _File:
    """The content of a file with its headers."""

    def __init__(self, path: Path) -> None:
        self.content, self.media_type = path.read_bytes(), TYPES[path.suffix]
        self.headers = {**HEADERS, "ETag": f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'}

    def response(self, request: Headers, method: str) -> Response:
        if self.headers["ETag"] in request.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        response = Response(self.content, headers=self.headers, media_type=self.media_type)
        if method == "HEAD":
            response.body = b""  # the length in the headers is that of GET
        return response
