"""Adapters come and go while the server runs: /v1/load_lora_adapter and /v1/unload_lora_adapter, as in vLLM."""

# Without `from __future__ import annotations`: see options.py.
import asyncio
from typing import Annotated, Any, Optional

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from glm_ms import spelling
from glm_ms.peft.adapter import StoredAdapter, base_remark, read_adapter
from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.names import FORM, NAME
from glm_ms.serve.options import Body
from glm_ms.storage.errors import FileError

router = APIRouter()


class LoadRequest(Body):
    """The fields of /v1/load_lora_adapter."""

    ignored = frozenset({"load_inplace"})

    lora_name: str = Field(description="The model that requests name.")
    lora_path: str = Field(min_length=1, description="Folder or file on the server.")
    lora_alpha: Optional[float] = Field(None, gt=0, description="Of the training, for LoRA of MindFormers.")


class UnloadRequest(Body):
    """The fields of /v1/unload_lora_adapter."""

    ignored = frozenset({"lora_int_id"})

    lora_name: str


def with_key(request: Request) -> None:
    """Raises APIError, 403, if the server has no key: whoever reaches it could read files of it."""
    if not request.app.state.keys:
        message = "adapters are loaded and unloaded on a server with a key only; start it with --api-key-file"
        raise APIError(403, message, code="needs_key")


@router.post("/v1/load_lora_adapter", summary="Load an adapter", dependencies=[Depends(with_key)])
async def load(body: LoadRequest, engine: Annotated[Engine, Depends(engine_of)]) -> dict[str, Any]:
    """Reads an adapter, LoRA or P-Tuning, and serves it under its name. Running answers do not change."""
    try:
        check_name(body.lora_name, engine)
        with spelling.of_request():
            stored = await run_in_threadpool(read_adapter, body.lora_path, body.lora_alpha)
        # An adapter that is on its way stays on it when the client leaves: nobody else could tell whether it is there.
        await asyncio.shield(run_in_threadpool(add, engine, body.lora_name, stored))
    except FileError as error:
        raise APIError(400, str(error), "lora_path") from None
    note = await run_in_threadpool(note_on_base, engine, stored)
    return {"status": "loaded", "model": body.lora_name, **({"note": note} if note else {})}


@router.post("/v1/unload_lora_adapter", summary="Unload an adapter", dependencies=[Depends(with_key)])
async def unload(body: UnloadRequest, engine: Annotated[Engine, Depends(engine_of)]) -> dict[str, Any]:
    """Takes no new requests for an adapter. Answers that have begun keep it to their end."""
    if engine.adapter_of(body.lora_name) is None:
        raise APIError(400, f"{body.lora_name} is the model itself, not an adapter", "lora_name")
    await asyncio.shield(run_in_threadpool(remove, engine, body.lora_name))
    return {"status": "unloaded", "model": body.lora_name}


def note_on_base(engine: Engine, stored: StoredAdapter) -> str:
    """Whether an adapter was trained on other weights; empty if it was not, or if there is nothing to compare."""
    if engine.base is None:
        return ""
    try:
        return base_remark(stored.path, engine.base).removeprefix("note: ")
    except (FileError, OSError) as error:  # the adapter is served all the same
        return f"not compared with the weights that it was trained on: {error}"


def check_name(name: str, engine: Engine) -> None:
    """Raises APIError, 400, if an adapter cannot have this name."""
    if NAME.fullmatch(name) is None:
        raise APIError(400, f"lora_name: a name {FORM}", "lora_name")
    if name == engine.name or name in engine.adapters:
        raise APIError(400, f"lora_name: {name} is served already; unload it, or choose another name", "lora_name")


def add(engine: Engine, name: str, stored: StoredAdapter) -> None:
    """Serves an adapter; AdapterError if it does not fit, or there is no room for it."""
    if engine.decoder is None:
        raise FileError("this server takes no adapters; start it with --max-adapters")
    engine.decoder.load_adapter(name, stored)
    engine.adapters[name] = str(stored.path)


def remove(engine: Engine, name: str) -> None:
    """Ends serving an adapter."""
    if engine.adapters.pop(name, None) is not None and engine.decoder is not None:
        engine.decoder.unload_adapter(name)
