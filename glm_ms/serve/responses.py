"""/v1/responses: OpenAI's newer interface to the same answers, without stored conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from glm_ms.serve.chat_completions import token_entries
from glm_ms.serve.chat_request import ChatSampling
from glm_ms.serve.dialogue import Called, Dialogue, Ended, Part, Question, Said, ask
from glm_ms.serve.engine import Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.formats import response_grammar
from glm_ms.serve.responses_request import ResponsesRequest
from glm_ms.serve.streams import EventStream, event, while_connected

router = APIRouter()
# Type of an event, and its fields.
News = tuple[str, dict[str, Any]]


@router.post("/v1/responses", summary="Answer an input")
async def responses(
    body: ResponsesRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]
) -> Response:
    """Answers a text or a conversation in the form of OpenAI's Responses interface."""
    dialogue = await ask(engine, _question(body))
    writer = _Writer(engine, body, dialogue)
    if body.stream:
        return EventStream(_stream(writer, dialogue))
    await while_connected(request.receive, dialogue.feed(writer.news))
    return JSONResponse(writer.response)


def _question(body: ResponsesRequest) -> Question:
    return Question(
        messages=body.messages(),
        sampling=ChatSampling.model_validate({"temperature": body.temperature, "top_p": body.top_p}),
        choice=body.choice(),
        model=body.model,
        max_tokens=body.max_output_tokens,
        limit_name="max_output_tokens",
        body=response_grammar(body.text.format if body.text is not None else None, "text.format"),
        body_name="text.format",
        logprobs=body.alternatives,
    )


async def _stream(writer: _Writer, dialogue: Dialogue) -> AsyncGenerator[bytes, None]:
    number, parts = 0, dialogue.parts()

    def numbered(news: News) -> bytes:
        nonlocal number
        kind, fields = news
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

    try:
        for kind in ("response.created", "response.in_progress"):
            yield numbered((kind, {"response": writer.response}))
        async for part in parts:
            for news in writer.news(part):
                yield numbered(news)
    except APIError as error:
        yield numbered(("error", {"code": error.code, "message": error.message, "param": error.param}))
    finally:
        await parts.aclose()


class _Writer:
    """The response object, and the events that tell how it grows.

    Attributes:
        response: the object so far.
    """

    def __init__(self, engine: Engine, body: ResponsesRequest, dialogue: Dialogue) -> None:
        self._engine, self._dialogue = engine, dialogue
        self._with_scores = body.alternatives is not None
        self._message: dict[str, Any] | None = None  # that is being written
        self.response: dict[str, Any] = _skeleton(engine, body)
        self._output: list[dict[str, Any]] = self.response["output"]

    def news(self, part: Part) -> Iterator[News]:
        """Adds a part; yields the events for it."""
        if isinstance(part, Said):
            yield from self._add_text(part)
        elif isinstance(part, Called):
            yield from self._end_message("completed")
            yield from self._add_call(part)
        else:
            yield from self._end_message("incomplete" if part.finish == "length" else "completed")
            yield self._end(part)

    def _add_text(self, part: Said) -> Iterator[News]:
        if self._message is None:
            self._message = {"type": "message", "id": _name("msg"), "status": "in_progress", "role": "assistant"}
            self._message["content"] = []
            self._output.append(self._message)
            yield "response.output_item.added", {"output_index": self._index, "item": self._message}
            block = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._message["content"].append(block)
            yield "response.content_part.added", {**self._place, "part": block}
        logprobs = token_entries(self._engine, part.scores) if self._with_scores else []
        block = self._message["content"][0]
        block["text"] += part.text
        block["logprobs"] += logprobs
        yield "response.output_text.delta", {**self._place, "delta": part.text, "logprobs": logprobs}

    def _end_message(self, status: str) -> Iterator[News]:
        if self._message is None:
            return
        block, place = self._message["content"][0], self._place
        yield "response.output_text.done", {**place, "text": block["text"], "logprobs": block["logprobs"]}
        yield "response.content_part.done", {**place, "part": block}
        self._message["status"] = status
        yield "response.output_item.done", {"output_index": self._index, "item": self._message}
        self._message = None

    def _add_call(self, part: Called) -> Iterator[News]:
        item = {"type": "function_call", "id": _name("fc"), "call_id": part.id, "name": part.name}
        item.update(arguments="", status="in_progress")
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": self._index}
        yield "response.output_item.added", {"output_index": self._index, "item": item}
        yield "response.function_call_arguments.delta", {**place, "delta": part.arguments}
        item.update(arguments=part.arguments, status="completed")
        yield "response.function_call_arguments.done", {**place, "name": part.name, "arguments": part.arguments}
        yield "response.output_item.done", {"output_index": self._index, "item": item}

    def _end(self, part: Ended) -> News:
        answer, generated = self._dialogue.answer, self._dialogue.generated
        cut = part.finish == "length"
        self.response.update(
            status="incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage={
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.prompt_tokens + generated,
            },
        )
        return f"response.{self.response['status']}", {"response": self.response}

    @property
    def _index(self) -> int:
        return len(self._output) - 1

    @property
    def _place(self) -> dict[str, Any]:
        """Where the text of the message is."""
        return {"item_id": self._output[-1]["id"], "output_index": self._index, "content_index": 0}


def _skeleton(engine: Engine, body: ResponsesRequest) -> dict[str, Any]:
    """A response before its first token."""
    text = {"format": (body.text.format if body.text is not None else None) or {"type": "text"}}
    sampling = ChatSampling
    return {
        "id": _name("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": body.model or engine.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature_default if body.temperature is None else body.temperature,
        "text": text,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p_default if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": body.metadata or {},
    }


def _name(kind: str) -> str:
    return f"{kind}_{uuid4().hex}"
