"""Answers to conversations while they are generated, for every chat interface: texts, tool calls, the end."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Union
from uuid import uuid4

from starlette.concurrency import run_in_threadpool

from glm_ms.serve.answer import Answer, Event, Job, TokenScore
from glm_ms.serve.conversation import Message, prompt_ids
from glm_ms.serve.engine import FINISH_REASONS, Engine
from glm_ms.serve.errors import APIError, wrong_field
from glm_ms.serve.guides import Grammar, GuideError, NewGuide
from glm_ms.serve.options import Sampling
from glm_ms.serve.text import StopSearch
from glm_ms.serve.tools import ToolChoice, choice_grammar
from glm_ms.tokenizer import AnswerParser, Text, ToolCall

# Lark expressions. ChatGLM3 begins the text of an answer with an empty first line, where the name of a tool can be.
_OPENING = {True: '" "? "\\n" " "?', False: '" "?'}  # tokenizer with roles -> what comes before a text
_SEPARATOR = "<|assistant|>"
_ANY_TEXT = "/(?s:.*)/"


@dataclass(frozen=True)
class Said:
    """A piece of the text of a choice, with its tokens if their log-probabilities are wanted."""

    choice: int
    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Called:
    """A tool call; `arguments` is a JSON object. `index` counts the calls of a choice."""

    choice: int
    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Ended:
    """The end of a choice: "stop", "length" or "tool_calls"; `stop`: the stop string or token of the request."""

    choice: int
    finish: str
    stop: str | int | None = None


Part = Union[Said, Called, Ended]


@dataclass(frozen=True)
class Question:
    """A conversation and what its answer may be.

    Attributes:
        sampling: how tokens are chosen.
        max_tokens: most tokens of an answer, None: all that the context has room for; `limit_name`: the name of this
            limit in the request.
        body: grammar of a text of the answer; `body_name`: the name of the field of the request that it comes from.
        logprobs: number of alternatives to each token, None: no log-probabilities.
    """

    messages: Sequence[Message]
    sampling: Sampling
    choice: ToolChoice = field(default_factory=ToolChoice)
    model: str | None = None
    max_tokens: int | None = None
    limit_name: str = "max_tokens"
    body: Grammar | None = None
    body_name: str = "response_format"
    logprobs: int | None = None

    @property
    def grammar_name(self) -> str:
        """The field of the request that the grammar of the answer comes from."""
        return "tools" if self.body is None else self.body_name


async def ask(engine: Engine, question: Question) -> Dialogue:
    """Hands a question to the scheduler.

    Raises:
        APIError: 400, something in it cannot be used; 404, no such model; 429, the queue is full; 503.
    """
    adapter = engine.adapter_of(question.model)
    choice = question.choice
    shown = () if choice.mode == "none" else choice.offered
    ids = await run_in_threadpool(prompt_ids, engine.tokenizer, question.messages, shown)
    room = engine.answer_room(len(ids), question.max_tokens, question.limit_name)
    config = question.sampling.config(engine, room)
    guide = await run_in_threadpool(_guide, engine, question)
    job = Job(
        ids=ids,
        config=config,
        adapter=adapter,
        stop=_safe_stops(question),
        include_stop=True,  # `_Choice` cuts the text
        logprobs=question.logprobs,
        guide=guide,
        seconds=engine.seconds,
    )
    return Dialogue(engine, engine.submit(job), question)


def _safe_stops(question: Question) -> tuple[str, ...]:
    """Stop strings at which the scheduler can end a choice.

    The others might also be found in what the template has before a text, or in a call. `_Choice` looks for all.
    """
    if question.choice.mode != "none":
        return ()
    return tuple(stop for stop in question.sampling.stop_texts if not stop[0].isspace())


def _guide(engine: Engine, question: Question) -> NewGuide | None:
    """The grammar of an answer; None: any answer."""
    choice, body = question.choice, question.body
    opening = _OPENING[bool(engine.tokenizer.roles)]
    text = f"{opening} {_ANY_TEXT if body is None else '@body'}"
    start = choice_grammar(choice, _SEPARATOR, text, always=body is not None)
    if start is None and body is None:
        return None
    try:
        # An answer that must be a call has no text.
        return engine.guides.compile(None if choice.mode == "required" else body, start or f"start: {text}")
    except GuideError as error:
        raise wrong_field(question.grammar_name, str(error)) from None
    except ImportError:
        raise APIError(400, "grammars and calls that must come need llguidance: pip install llguidance") from None


class Dialogue:
    """The answer to a question while it is generated.

    Attributes:
        answer: of the scheduler.
        choices: number of choices.
    """

    def __init__(self, engine: Engine, answer: Answer, question: Question) -> None:
        self._engine, self.answer, self._question = engine, answer, question
        self.choices = question.sampling.n or 1
        self._readers = [_Choice(engine, question, number) for number in range(self.choices)]

    @property
    def generated(self) -> int:
        """Tokens of all choices so far, end tokens included."""
        return sum(reader.count for reader in self._readers)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The parts of all choices as they come. Closing the generator frees what the answer uses.

        Raises:
            APIError: 503, the server stops; 500, computing the answer has failed; 400, its grammar is too complex.
        """
        events = self._engine.events(self.answer)
        try:
            async for one in events:
                for part in self._readers[one.choice].read(one):
                    yield part
                if all(reader.ended for reader in self._readers):
                    return
        except APIError as error:
            if isinstance(error.__cause__, GuideError):
                raise wrong_field(self._question.grammar_name, str(error.__cause__)) from None
            raise
        finally:
            await events.aclose()

    async def feed(self, take: Callable[[Part], Iterable[object]]) -> None:
        """Hands every part to `take`, and runs what it returns to its end. Raises as `parts`."""
        async for part in self.parts():
            deque(take(part), maxlen=0)


class _Choice:
    """One choice: from the events of the scheduler to parts."""

    def __init__(self, engine: Engine, question: Question, number: int) -> None:
        self._engine, self._number = engine, number
        self._tools = {} if question.choice.mode == "none" else {tool.name: tool for tool in question.choice.offered}
        self._parallel = question.choice.parallel
        self._with_scores = question.logprobs is not None
        self._parser: AnswerParser = engine.tokenizer.answer_parser(self._tools)
        sampling = question.sampling
        self._stops = StopSearch(sampling.stop_texts, bool(sampling.include_stop_str_in_output))
        self._least = sampling.min_tokens or 0  # tokens before a stop string may end the text
        self._scores: list[TokenScore] = []  # of text that was not given out
        self._calls = 0
        self._has_text = False
        self.count = 0  # of tokens
        self.ended = False

    def read(self, one: Event) -> list[Part]:
        """The parts that are final after an event; none after the end."""
        if self.ended:
            return []
        self.count += len(one.tokens)
        if self._with_scores:
            ends = self._engine.tokenizer.stop_token_ids
            self._scores += [score for score in one.tokens if score.token not in ends]
        search = self.count > self._least or isinstance(one.stop_reason, str)
        parts = self._parsed(self._parser.push(one.text), search)
        if one.finish is None or self.ended:
            return parts
        parts += self._parsed(self._parser.close(), search)
        if not self.ended:
            parts += [*self._said(self._stops.flush()), self._end(one)]
        return parts

    def _parsed(self, found: Sequence[Text | ToolCall], search: bool) -> list[Part]:
        parts: list[Part] = []
        for item in found:
            if self.ended:
                break
            if isinstance(item, Text):
                parts += self._said(self._stops.push(item.text, search))
                if self._stops.found is not None:
                    self.ended = True
                    parts.append(Ended(self._number, "stop", self._stops.found))
                continue
            parts += self._said(self._stops.flush())
            name = f"call_{uuid4().hex[:24]}"
            arguments = self._tools[item.name].arguments(item.arguments)
            parts.append(Called(self._number, self._calls, name, item.name, arguments))
            self._calls += 1
            self._scores.clear()
            if not self._parallel:
                self.ended = True
                parts.append(Ended(self._number, "tool_calls"))
        return parts

    def _said(self, text: str) -> list[Part]:
        if not text:
            return []
        scores, self._scores = self._scores, []
        content = [self._engine.token_bytes(score.token) for score in scores]
        while not self._has_text and content and not content[0].strip():  # before the text
            del content[0], scores[0]
        length = len(text.encode())
        while self._stops.found is not None and content and sum(map(len, content[:-1])) >= length:  # after it
            del content[-1], scores[-1]
        self._has_text = True
        return [Said(self._number, text, tuple(scores))]

    def _end(self, one: Event) -> Ended:
        self.ended = True
        finish = FINISH_REASONS.get(one.finish or "stop", "stop")
        if finish == "stop" and self._calls:
            return Ended(self._number, "tool_calls")
        own = one.stop_reason in self._engine.tokenizer.stop_token_ids
        return Ended(self._number, finish, None if own else one.stop_reason)
