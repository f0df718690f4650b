"""/v1/messages: the same answers in the form of Anthropic's interface, for its clients."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from glm_ms.serve.conversation import prompt_ids
from glm_ms.serve.dialogue import Called, Dialogue, Ended, Part, Question, Said, ask
from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import BODIES, APIError
from glm_ms.serve.formats import response_grammar
from glm_ms.serve.messages_request import CountRequest, MessagesRequest
from glm_ms.serve.streams import EventStream, event, while_connected

router = APIRouter()
# Type of an event, and its fields.
News = tuple[str, dict[str, Any]]
_PATH = "/v1/messages"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def error_body(error: APIError) -> dict[str, Any]:
    """The JSON object of Anthropic's errors."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


BODIES[_PATH] = error_body


@router.post(_PATH, summary="Answer a conversation, in Anthropic's form")
async def messages(body: MessagesRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]) -> Response:
    """Answers a conversation in the form of Anthropic's Messages interface."""
    dialogue = await ask(engine, _question(body))
    writer = _Writer(body.model or engine.name, dialogue)
    if body.stream:
        return EventStream(_stream(writer, dialogue))
    await while_connected(request.receive, dialogue.feed(writer.news))
    return JSONResponse(writer.message)


@router.post(f"{_PATH}/count_tokens", summary="Count the tokens of a conversation")
async def count_tokens(body: CountRequest, engine: Annotated[Engine, Depends(engine_of)]) -> dict[str, int]:
    """The number of tokens of the prompt that a conversation becomes."""
    engine.adapter_of(body.model)
    choice = body.choice()
    shown = () if choice.mode == "none" else choice.offered
    ids = await run_in_threadpool(prompt_ids, engine.tokenizer, body.conversation(), shown)
    return {"input_tokens": len(ids)}


def _question(body: MessagesRequest) -> Question:
    output = body.output_config
    return Question(
        messages=body.conversation(),
        sampling=body.sampling,
        choice=body.choice(),
        model=body.model,
        max_tokens=body.max_tokens,
        body=response_grammar(output.format if output is not None else None, "output_config.format"),
        body_name="output_config.format",
    )


async def _stream(writer: _Writer, dialogue: Dialogue) -> AsyncGenerator[bytes, None]:
    parts, begun = dialogue.parts(), False
    try:
        async for part in parts:
            if not begun:
                begun = True
                yield _event(("message_start", {"message": writer.start()}))
            for news in writer.news(part):
                yield _event(news)
    except APIError as error:
        yield event(error_body(error), "error")
    finally:
        await parts.aclose()


def _event(news: News) -> bytes:
    kind, fields = news
    return event({"type": kind, **fields}, kind)


class _Writer:
    """The message, and the events that tell how it grows.

    Attributes:
        message: the object so far.
    """

    def __init__(self, model: str, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._in_text = False
        self._content: list[dict[str, Any]] = []
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def start(self) -> dict[str, Any]:
        """The message before its first block."""
        return {**self.message, "content": [], "usage": self._usage(0)}

    def news(self, part: Part) -> Iterator[News]:
        """Adds a part; yields the events for it."""
        if isinstance(part, Said):
            if not self._in_text:
                self._in_text = True
                self._content.append({"type": "text", "text": ""})
                yield "content_block_start", {"index": self._index, "content_block": {"type": "text", "text": ""}}
            self._content[-1]["text"] += part.text
            yield self._delta({"type": "text_delta", "text": part.text})
            return
        if self._in_text:
            self._in_text = False
            yield "content_block_stop", {"index": self._index}
        if isinstance(part, Called):
            yield from self._add_call(part)
        else:
            yield from self._end(part)

    def _add_call(self, part: Called) -> Iterator[News]:
        block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        self._content.append({**block, "input": json.loads(part.arguments)})
        yield "content_block_start", {"index": self._index, "content_block": block}
        yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})
        yield "content_block_stop", {"index": self._index}

    def _end(self, part: Ended) -> Iterator[News]:
        stopped = isinstance(part.stop, str)
        reason = {
            "stop_reason": "stop_sequence" if stopped else _REASONS[part.finish],
            "stop_sequence": part.stop if stopped else None,
        }
        usage = self._usage(self._dialogue.generated)
        self.message.update(**reason, usage=usage)
        yield "message_delta", {"delta": reason, "usage": usage}
        yield "message_stop", {}

    def _delta(self, delta: dict[str, Any]) -> News:
        return "content_block_delta", {"index": self._index, "delta": delta}

    def _usage(self, generated: int) -> dict[str, int]:
        answer = self._dialogue.answer
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.cached_tokens,
            "output_tokens": generated,
        }

    @property
    def _index(self) -> int:
        return len(self._content) - 1
