"""/tokenize, /detokenize and /tokenizer_info, in vLLM's form. lm-eval uses them as its tokenizer."""

# Without `from __future__ import annotations`: see options.py.
from typing import Annotated, Any, Optional

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.options import Body, TokenId

router = APIRouter()
Running = Annotated[Engine, Depends(engine_of)]


class TokenizeRequest(Body):
    """The fields of /tokenize."""

    model: Optional[str] = None
    prompt: str
    add_special_tokens: Optional[bool] = Field(None, description="[gMASK] sop before the text; true by default.")
    return_token_strs: Optional[bool] = None


class DetokenizeRequest(Body):
    """The fields of /detokenize."""

    model: Optional[str] = None
    tokens: list[TokenId]


@router.post("/tokenize", summary="Token ids of a text")
async def tokenize(body: TokenizeRequest, engine: Running) -> dict[str, Any]:
    """The ids that /v1/completions makes of a text."""
    engine.adapter_of(body.model)
    ids = await engine.encode(body.prompt, special=body.add_special_tokens is not False)
    texts = [engine.token_text(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": texts}


@router.post("/detokenize", summary="Text of token ids")
async def detokenize(body: DetokenizeRequest, engine: Running) -> dict[str, str]:
    """The text of ids."""
    engine.adapter_of(body.model)
    for token in body.tokens:
        if token >= engine.tokenizer.vocab_size:
            last = engine.tokenizer.vocab_size - 1
            raise APIError(400, f"tokens: {token}: the tokenizer has ids 0..{last}", "tokens")
    return {"prompt": await run_in_threadpool(engine.tokenizer.decode, body.tokens)}


@router.get("/tokenizer_info", summary="Special tokens and class of the tokenizer")
async def tokenizer_info(engine: Running) -> dict[str, Any]:
    """What a client must know of the tokenizer. ChatGLM builds prompts from ids: it has no chat template of text."""
    tokenizer = engine.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": engine.context,
        "eos_token": tokenizer.eos_token,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token": tokenizer.unk_token,
        "bos_token": None,
        "prefix_token_ids": tokenizer.prefix_tokens,
        "stop_token_ids": tokenizer.stop_token_ids,
        "additional_special_tokens": list(tokenizer.special_tokens),
        "chat_template": None,
    }
