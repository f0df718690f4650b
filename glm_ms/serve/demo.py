"""`POST /` as the `api.py` of the ChatGLM repositories: prompt and history in, response and history out."""

# Without `from __future__ import annotations`: see options.py.
import datetime
from typing import Annotated, Any, Optional, Union

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from glm_ms.generation.config import GenerationConfig
from glm_ms.serve.answer import Job
from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.options import Body
from glm_ms.serve.streams import while_connected
from glm_ms.tokenizer.answers import replace_training_date

router = APIRouter()
# Defaults of the original.
_MAX_LENGTH, _TOP_P, _TEMPERATURE = 2048, 0.7, 0.95

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class DemoRequest(Body):
    """The fields of `POST /`. Null and 0 mean the default, as in the original."""

    prompt: str
    history: Optional[Union[list[Pair], list[dict[str, Any]]]] = Field(
        None, description="Pairs of question and answer; for ChatGLM3 also messages with role and content."
    )
    max_length: Optional[int] = Field(None, ge=0, description="Tokens of prompt and answer together; 2048 by default.")
    top_p: Optional[float] = Field(None, ge=0, le=1)
    temperature: Optional[float] = Field(None, ge=0, le=100)


@router.post("/", summary="The interface of the ChatGLM demos")
async def demo(body: DemoRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]) -> dict[str, Any]:
    """Answers a question; the history that it returns is that of the next question."""
    history = body.history or []
    messages = _messages(history) if engine.tokenizer.roles else history
    try:
        ids = (await run_in_threadpool(engine.tokenizer.build_chat_input, body.prompt, messages))["input_ids"]
    except (ValueError, AssertionError) as error:
        raise APIError(400, str(error), "history") from None
    answer = engine.submit(Job(ids=ids, config=_config(engine, body, len(ids)), seconds=engine.seconds))
    (events,) = await while_connected(request.receive, engine.collect([answer]))
    response = replace_training_date("".join(event.text for event in events).strip())
    return {
        "response": response,
        "history": [*history, *_new_items(history, body.prompt, response)],
        "status": 200,
        "time": datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }


def _messages(history: list[Any]) -> list[dict[str, Any]]:
    """Pairs as messages; messages stay as they are."""
    if not any(isinstance(item, list) for item in history):
        return history
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair)]


def _new_items(history: list[Any], prompt: str, response: str) -> list[Any]:
    """The last question and answer, in the form of the history."""
    if history and isinstance(history[0], dict):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return [[prompt, response]]


def _config(engine: Engine, body: DemoRequest, prompt: int) -> GenerationConfig:
    longest = min(body.max_length or _MAX_LENGTH, engine.context)
    if prompt >= longest:
        message = f"prompt and history have {prompt} tokens, which leaves no room within max_length = {longest}"
        raise APIError(400, f"{message}; shorten the history", "max_length", "context_length_exceeded")
    return GenerationConfig(
        max_new_tokens=longest - prompt,
        do_sample=True,
        top_p=float(body.top_p or _TOP_P),
        temperature=max(float(body.temperature or _TEMPERATURE), 1e-6),
        eos_token_id=[token for token in engine.tokenizer.stop_token_ids if token < engine.vocab_size] or None,
        prompt_lookup_num_tokens=engine.prompt_lookup_num_tokens,
    )
