"""/v1/completions: text or ids that the model continues, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from glm_ms.serve.answer import Answer, Event, Job, TokenScore
from glm_ms.serve.completion_request import CompletionRequest
from glm_ms.serve.engine import FINISH_REASONS, Engine, engine_of
from glm_ms.serve.errors import APIError
from glm_ms.serve.streams import DONE, EventStream, event, merged, while_connected
from glm_ms.tokenizer import IncrementalDecoder

router = APIRouter()
Prompt = Any  # a text, or a list of ids


@router.post("/v1/completions", summary="Continue a text")
async def complete(
    body: CompletionRequest, request: Request, engine: Annotated[Engine, Depends(engine_of)]
) -> Response:
    """Continues one text or several, given as text or as token ids, in OpenAI's form."""
    adapter = engine.adapter_of(body.model)
    prompts = [await _ids(engine, body, prompt) for prompt in body.prompts]
    answers = engine.submit_all([_job(engine, body, ids, adapter) for ids in prompts])
    texts = [_Text(engine, body, *pair) for pair in zip(prompts, body.prompts) for _ in range(body.n or 1)]
    head = {
        "id": f"cmpl-{uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or engine.name,
    }
    if body.stream:
        return EventStream(_stream(engine, body, head, answers, texts))
    found = await while_connected(request.receive, engine.collect(answers))
    choices = []
    for index, text in enumerate(texts):
        answer, choice = divmod(index, body.n or 1)
        parts = [text.part(one, answers[answer]) for one in found[answer] if one.choice == choice]
        choices.append({"index": index, **_joined(parts)})
    return JSONResponse({**head, "choices": choices, "usage": usage(answers, sum(text.count for text in texts))})


async def _stream(
    engine: Engine, body: CompletionRequest, head: dict[str, Any], answers: Sequence[Answer], texts: Sequence[_Text]
) -> AsyncGenerator[bytes, None]:
    nothing = {"usage": None} if body.with_usage else {}
    news = merged([engine.events(answer) for answer in answers])
    try:
        async for number, one in news:
            index = number * (body.n or 1) + one.choice
            choice = {"index": index, **texts[index].part(one, answers[number])}
            yield event({**head, "choices": [choice], **nothing})
    finally:
        await news.aclose()
    if body.with_usage:
        yield event({**head, "choices": [], "usage": usage(answers, sum(text.count for text in texts))})
    yield event(DONE)


def usage(answers: Sequence[Answer], generated: int) -> dict[str, Any]:
    """`usage` of OpenAI: numbers of tokens. A prompt counts once, however many answers it has."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers)},
    }


async def _ids(engine: Engine, body: CompletionRequest, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        ids = await engine.encode(prompt, special=body.add_special_tokens is not False)
        if not ids:
            raise APIError(400, "prompt: has no token; give a text", "prompt")
        return ids
    engine.check_ids(prompt, "prompt")
    return prompt


def _job(engine: Engine, body: CompletionRequest, ids: list[int], adapter: str | None) -> Job:
    # For the prompt alone one token is computed, too, and not shown.
    room = engine.answer_room(len(ids), body.new_tokens or 1)
    return Job(
        ids=ids,
        config=body.config(engine, room),
        adapter=adapter,
        stop=body.stop_texts,
        include_stop=bool(body.include_stop_str_in_output),
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        seconds=engine.seconds,
    )


class _Text:
    """One choice of a response: makes its parts, with the prompt in the first one if it is wanted."""

    def __init__(self, engine: Engine, body: CompletionRequest, ids: list[int], prompt: Prompt) -> None:
        self._engine, self._body, self._ids = engine, body, ids
        self._prompt = prompt if isinstance(prompt, str) else None
        self._decoder = IncrementalDecoder(engine.tokenizer)
        self._offset = 0  # characters before the next token
        self._space = ""  # before the answer; decoding drops it
        self._begun = False
        self.count = 0  # of generated tokens

    def part(self, one: Event, answer: Answer) -> dict[str, Any]:
        """Text, log-probabilities and reason of the end of an event."""
        text, columns, wanted = "", _Columns(self._engine), self._body.new_tokens > 0
        if self._body.echo and not self._begun:
            text = self._add_prompt(columns, answer)
        self._begun = True
        if wanted:
            text += self._add_answer(columns, one)
        return {
            "text": text,
            "logprobs": None if self._body.logprobs is None else columns.values,
            "finish_reason": one.finish and (FINISH_REASONS[one.finish] if wanted else "length"),
            "stop_reason": one.stop_reason if wanted else None,
        }

    def _add_prompt(self, columns: _Columns, answer: Answer) -> str:
        """The prompt. `[gMASK] sop` is not in its text, and not among its tokens if it was given as text."""
        tokenizer, ids = self._engine.tokenizer, self._ids
        prefix = tokenizer.prefix_tokens
        hidden = len(prefix) if ids[: len(prefix)] == prefix else 0
        decoder, offsets, text = IncrementalDecoder(tokenizer), [0] * hidden, ""
        for token in ids[hidden:]:
            offsets.append(len(text))
            text += decoder.push(token) if token < tokenizer.vocab_size else ""
        text += decoder.flush()
        if answer.prompt_scores is not None:
            rows = list(zip(ids, offsets, [None, *answer.prompt_scores]))
            # A client that knows the ids of the text alone, as lm-eval, counts on them.
            for row in rows if self._prompt is None else rows[hidden:]:
                columns.add(*row)
        text = text if self._prompt is None else self._prompt
        self._offset = len(text)
        return text

    def _add_answer(self, columns: _Columns, one: Event) -> str:
        engine = self._engine
        for score in one.tokens:
            columns.add(score.token, self._offset, score)
            if not self.count and engine.token_bytes(score.token).startswith(b" "):
                self._space = " "
                self._offset += 1
            self.count += 1
            if score.token < engine.tokenizer.vocab_size:
                self._offset += len(self._decoder.push(score.token))
        if not one.text:
            return ""
        text, self._space = self._space + one.text, ""
        return text


class _Columns:
    """`logprobs` of a choice, as /v1/completions of OpenAI writes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.values: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, offset: int, score: TokenScore | None) -> None:
        """Adds a token; `score` is None for the first one of a prompt."""
        text = self._engine.token_text
        top: dict[str, float] | None = None
        if score is not None:
            top = {}
            for one, value in (*score.top, (token, score.logprob)):
                top.setdefault(text(one), value)
        row: tuple[Any, ...] = text(token), None if score is None else score.logprob, top, offset
        for column, item in zip(self.values.values(), row):
            column.append(item)


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a choice as one."""
    columns = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    logprobs = {name: [item for one in columns for item in one[name]] for name in columns[0]} if columns else None
    return {**parts[-1], "text": "".join(part["text"] for part in parts), "logprobs": logprobs}
