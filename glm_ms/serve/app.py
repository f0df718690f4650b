"""The HTTP application: `create_app`. Each kind of path is in a file of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from glm_ms.serve import adapters, chat_completions, completions, demo, messages, probes, responses, tokens
from glm_ms.serve.auth import Keys
from glm_ms.serve.engine import Engine
from glm_ms.serve.errors import add_error_handlers
from glm_ms.serve.guards import CheckBody, CheckHost, RequireKey
from glm_ms.serve.web_page import ChatPage
from glm_ms.version import __version__

# A module for each kind of path, with its `router`.
DOORS = (probes, chat_completions, responses, messages, completions, tokens, demo, adapters)
PUBLIC = {"/health", "/ready"}  # without a key


def create_app(
    engine: Engine | None = None,
    keys: Keys | None = None,
    cors_origins: Sequence[str] = (),
    web: bool = False,
    allowed_hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application.

    Args:
        engine: the model; None: it comes later, as `app.state.engine`, and until then requests get status 503.
        keys: open the server; None or none: everybody may use it.
        cors_origins: web pages of these origins may use the server, as `https://chat.example.org`.
        web: `GET /` is the chat page.
        allowed_hosts: requests must name one of them, or this machine, as their host; None: they may name any.
    """
    app = FastAPI(title="glm_ms", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engine, app.state.keys = engine, keys or Keys()
    for door in DOORS:
        app.include_router(door.router)
    add_error_handlers(app)
    # The last one added is the first one that sees a request.
    app.add_middleware(CheckBody)
    app.add_middleware(RequireKey, keys=app.state.keys, public=PUBLIC)
    if cors_origins:
        headers: dict[str, Any] = {"allow_headers": ["Authorization", "Content-Type", "X-Api-Key"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], **headers)
    if web:
        app.add_middleware(ChatPage)
    if allowed_hosts is not None:
        app.add_middleware(CheckHost, allowed=allowed_hosts, public=PUBLIC)
    return app
