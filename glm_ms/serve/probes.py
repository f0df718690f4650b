"""Paths that say how the server is: /health, /ready, /metrics, /v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.metrics import CONTENT_TYPE
from glm_ms.storage.suggest import did_you_mean
from glm_ms.version import __version__

router = APIRouter()
Running = Annotated[Engine, Depends(engine_of)]


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="The process answers")
async def health() -> dict[str, str]:
    """Status 200 as long as the process answers, also while it loads the model."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Requests are answered")
async def ready(engine: Running) -> dict[str, str]:
    """Status 200 when the model is loaded and compiled; 503 before that, while the server stops, and after a failure
    that only a restart ends."""
    engine.check_running()
    return {"status": "ready"}


@router.get("/version", summary="Version of the server")
async def version() -> dict[str, str]:
    """Version of glm_ms."""
    return {"version": __version__}


@router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
async def metrics(engine: Running) -> Response:
    """Numbers in the text format of Prometheus."""
    return Response(engine.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/v1/models", summary="The model and its adapters")
async def models(engine: Running) -> dict[str, Any]:
    """The model and its adapters, in OpenAI's form."""
    return {"object": "list", "data": _models(engine)}


@router.get("/v1/models/{model:path}", summary="One model")
async def one_model(model: str, engine: Running) -> dict[str, Any]:
    """One of the list; 404 if there is none of this name."""
    found = {item["id"]: item for item in _models(engine)}
    if model not in found:
        hint = did_you_mean(model, found, f"; known: {', '.join(list(found)[:10])}")
        raise APIError(404, f"model {model[:100]!r} does not exist{hint}", "model", "model_not_found")
    return found[model]


def _models(engine: Engine) -> list[dict[str, Any]]:
    common = {"object": "model", "created": engine.created, "owned_by": "glm_ms", "max_model_len": engine.context}
    own = {"id": engine.name, **common, "root": engine.name, "parent": None}
    return [own, *({"id": name, **common, "root": name, "parent": engine.name} for name in engine.adapters)]
