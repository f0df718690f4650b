"""/v1/chat/completions: the next message of a conversation, in OpenAI's form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from glm_ms.serve.answer import TokenScore
from glm_ms.serve.chat_request import ChatRequest
from glm_ms.serve.completions import usage
from glm_ms.serve.conversation import read_messages
from glm_ms.serve.dialogue import Called, Dialogue, Part, Question, Said, ask
from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.formats import response_grammar, structured_grammar
from glm_ms.serve.streams import DONE, EventStream, event, while_connected
from glm_ms.serve.tools import read_choice, read_tools

router = APIRouter()
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(
    body: ChatRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]
) -> Response:
    """Answers a conversation in OpenAI's form, with tools, grammars and streaming."""
    dialogue = await ask(engine, _question(body))
    head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": body.model or engine.name}
    if body.stream:
        return EventStream(_stream(engine, body, {**head, "object": "chat.completion.chunk"}, dialogue))
    whole = _whole(engine, body, dialogue)
    return JSONResponse({**head, "object": "chat.completion", **await while_connected(request.receive, whole)})


def _question(body: ChatRequest) -> Question:
    tools = read_tools(body.tools)
    structured = body.structured_outputs
    return Question(
        messages=read_messages(body.messages),
        sampling=body,
        choice=read_choice(body.tool_choice, body.parallel_tool_calls, tools),
        model=body.model,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        limit_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        body=response_grammar(body.response_format) if structured is None else structured_grammar(structured),
        body_name="response_format" if structured is None else "structured_outputs",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


async def _whole(engine: Engine, body: ChatRequest, dialogue: Dialogue) -> dict[str, Any]:
    """The choices and the usage of an answer that is not streamed."""
    texts: list[list[Said]] = [[] for _ in range(dialogue.choices)]
    calls: list[list[dict[str, Any]]] = [[] for _ in range(dialogue.choices)]
    choices: list[dict[str, Any]] = [{} for _ in range(dialogue.choices)]
    async for part in dialogue.parts():
        number = part.choice
        if isinstance(part, Said):
            texts[number].append(part)
        elif isinstance(part, Called):
            calls[number].append(_call(part))
        else:
            said, called = texts[number], calls[number]
            text = "".join(one.text for one in said)
            content = {"content": None if called and not text else text, "refusal": None}
            scores = [score for one in said for score in one.scores]
            choices[number] = {
                "index": number,
                "message": {"role": "assistant", **content, **({"tool_calls": called} if called else {})},
                "logprobs": _logprobs(engine, scores) if body.logprobs else None,
                "finish_reason": part.finish,
                "stop_reason": part.stop,
            }
    return {"choices": choices, "usage": usage([dialogue.answer], dialogue.generated)}


async def _stream(
    engine: Engine, body: ChatRequest, head: dict[str, Any], dialogue: Dialogue
) -> AsyncGenerator[bytes, None]:
    nothing = {"usage": None} if body.with_usage else {}
    parts = dialogue.parts()
    begun: set[int] = set()
    try:
        async for part in parts:
            if part.choice not in begun:
                begun.add(part.choice)
                choice = _chunk(part.choice, {"role": "assistant", "content": ""})
                yield event({**head, "choices": [choice], **nothing})
            yield event({**head, "choices": [_news(engine, body, part)], **nothing})
    finally:
        await parts.aclose()
    if body.with_usage:
        yield event({**head, "choices": [], "usage": usage([dialogue.answer], dialogue.generated)})
    yield event(DONE)


def _news(engine: Engine, body: ChatRequest, part: Part) -> dict[str, Any]:
    """The choice of a chunk."""
    if isinstance(part, Said):
        logprobs = {"logprobs": _logprobs(engine, part.scores)} if body.logprobs else {}
        return _chunk(part.choice, {"content": part.text}, **logprobs)
    if isinstance(part, Called):
        return _chunk(part.choice, {"tool_calls": [{"index": part.index, **_call(part)}]})
    return _chunk(part.choice, {}, finish_reason=part.finish, stop_reason=part.stop)


def _chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}


def _call(part: Called) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _logprobs(engine: Engine, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`logprobs` of a choice or of a chunk."""
    return {"content": token_entries(engine, scores), "refusal": None}


def token_entries(engine: Engine, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities and the alternatives that were asked for, as OpenAI writes them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        logprob = max(value, _LEAST_LOGPROB)
        return {"token": engine.token_text(token), "logprob": logprob, "bytes": list(engine.token_bytes(token))}

    return [
        {**entry(score.token, score.logprob), "top_logprobs": [entry(*one) for one in score.top]} for score in scores
    ]
