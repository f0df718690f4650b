"""The scheduler: one thread runs one batch of sequences, which requests join and leave between any two steps.

Each round of the thread computes at most one chunk of one prompt and one token of every running sequence. So a long
prompt delays a stream by a chunk per token. What a request gets depends on its own options alone.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from glm_ms.generation.decode import check_streamable
from glm_ms.generation.inputs import Prompt, checked_rows, new_token_limits
from glm_ms.generation.lookup import Lookup
from glm_ms.generation.pages import NoRoom
from glm_ms.generation.sampling import RowSampler, largest, log_softmax, row_samplers
from glm_ms.generation.speculation import Row, Speculation, Step, Totals
from glm_ms.serve.answer import Answer, Event, Guide, Job, TokenScore
from glm_ms.serve.text import AnswerText
from glm_ms.tokenizer import SentencePieceTokenizer

__all__ = ["Answer", "Event", "Guide", "Job", "QueueFull", "Scheduler", "Stats", "Stopped", "TokenScore"]

# Weight of the newest job in the mean duration that `retry_after` is made of.
_NEWEST = 0.2


class SlotDecoder(Protocol):
    """What the scheduler needs of `glm_ms.generation.paged.PagedDecoder`."""

    slots: int  # sequences at a time
    capacity: int  # most tokens of one, prompt and answer
    vocab_size: int
    exact_rows: bool  # whether `extend` and `truncate` work

    @property
    def pages_total(self) -> int: ...

    @property
    def pages_used(self) -> int: ...

    def open(self, ids: Sequence[int], adapter: str | None = None) -> int: ...

    def cached(self, slot: int) -> int: ...

    def prefill(self, slot: int, all_logits: bool = False) -> np.ndarray | None: ...

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray: ...

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def truncate(self, slot: int, count: int) -> None: ...

    def fork(self, slots: Sequence[int]) -> list[int]: ...

    def free(self, slots: Sequence[int]) -> None: ...


class QueueFull(RuntimeError):  # noqa: N818 - its name says what happened
    """Too many jobs wait. `retry_after`: whole seconds after which there is probably room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(RuntimeError):  # noqa: N818
    """The scheduler takes no new jobs."""


@dataclass(frozen=True)
class Stats:
    """A snapshot, and totals since the start."""

    running: int  # jobs with slots
    waiting: int  # jobs without
    pages_total: int
    pages_used: int
    prompt_tokens: int  # of prompts that were computed
    cached_tokens: int  # of these, found computed
    generated_tokens: int
    finished: dict[str, int]  # choices by `Event.finish`
    failed: int  # jobs
    speculation: Totals


@dataclass(eq=False)
class _Row:
    """A choice that is being generated."""

    run: _Run
    choice: int
    slot: int
    sampler: RowSampler
    guide: Guide | None
    text: AnswerText
    count: int = 0  # of generated tokens
    token: int = 0  # the last of them
    lookup: Lookup | None = None  # for tokens that may follow; None: there is no use
    unsent: list[TokenScore] = field(default_factory=list)


@dataclass(eq=False)
class _Run:
    """A job from `submit` to its end."""

    job: Job
    answer: Answer
    limit: int  # most new tokens
    arrived: float
    started: float = 0.0  # when it got slots
    slot: int | None = None  # until the choices have their own
    prompt_scores: list[TokenScore] = field(default_factory=list)
    logits: np.ndarray | None = None  # float32 [V], after the last prompt token
    rows: list[_Row] = field(default_factory=list)  # that are not finished
    cancelled: bool = False

    @property
    def choices(self) -> int:
        return self.job.config.num_return_sequences

    @property
    def slots(self) -> int:
        """Slots that it has or still needs."""
        return self.choices if self.slot is not None else len(self.rows)

    def overdue(self, now: float) -> bool:
        return self.job.seconds is not None and now >= self.arrived + self.job.seconds


class Scheduler:
    """Runs jobs in the slots of a decoder.

    Jobs start in the order in which they came. A job of n choices waits for n slots and computes its prompt once.

    Args:
        max_queue: most jobs that wait for slots.

    Attributes:
        on_failure: called in the thread after an error that has ended it and all jobs.
    """

    on_failure: Callable[[Exception], None] = staticmethod(lambda error: None)

    def __init__(self, decoder: SlotDecoder, tokenizer: SentencePieceTokenizer, max_queue: int = 64) -> None:
        self._decoder, self._tokenizer, self._max_queue = decoder, tokenizer, max_queue
        self._speculation = Speculation(decoder)
        self._changed = threading.Condition(threading.RLock())  # guards what follows
        self._waiting: deque[_Run] = deque()
        self._active: list[_Run] = []  # with slots
        self._prefilling: deque[_Run] = deque()  # of these, without choices yet
        self._draining = self._closing = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._mean_seconds = 1.0  # of a job in its slots
        self._tokens = Counter[str]()
        self._finished = Counter[str]()
        self._failed = 0

    def start(self) -> None:
        """Starts the thread. Call `close` at the end; the interpreter's exit does it too."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="glm_ms scheduler", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def submit(self, job: Job) -> Answer:
        """Adds a job to the queue. Any thread may call it.

        Raises:
            QueueFull: all slots are taken, and `max_queue` jobs wait for them already.
            Stopped: `drain` or `close` was called.
            ValueError: a job that can never run; the message says why.
        """
        limit = self._check(job)
        answer = Answer(len(job.ids), self._cancel)
        with self._changed:
            if self._error is not None:
                raise Stopped(f"the server has failed: {self._error}; its log has the details") from self._error
            if self._draining or self._closing:
                raise Stopped("the server is stopping and takes no new requests")
            run = _Run(job, answer, limit, time.monotonic())
            if self._queued([*self._waiting, run]) > self._max_queue:
                retry_after = max(1, math.ceil(self._mean_seconds / self._decoder.slots))
                raise QueueFull(len(self._waiting), retry_after)
            self._waiting.append(run)
            self._changed.notify_all()
        return answer

    def drain(self, seconds: float) -> bool:
        """Takes no new jobs and waits for the others, at most so long; then cancels them.

        Returns:
            Whether all of them finished.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not (self._waiting or self._active), seconds)
            for run in [*self._waiting, *self._active]:
                run.cancelled = True
            self._changed.notify_all()
        return done

    def close(self) -> None:
        """Cancels all jobs and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self.close)
        for run in [*self._waiting, *self._active]:
            self._end(run, "cancelled")

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes jobs."""
        with self._changed:
            return self._thread is not None and not (self._draining or self._closing or self._error)

    @property
    def stats(self) -> Stats:
        with self._changed:
            decoder, tokens = self._decoder, self._tokens
            return Stats(
                len(self._active), len(self._waiting), decoder.pages_total, decoder.pages_used,
                tokens["prompt"], tokens["cached"], tokens["generated"], dict(self._finished), self._failed,
                replace(self._speculation.totals),
            )  # fmt: skip

    def round(self) -> bool:
        """What the thread does again and again; False if nothing is to do. For programs that do without the thread."""
        self._end_unwanted()
        self._admit()
        self._prefill()
        self._step()
        with self._changed:
            return bool(self._waiting or self._active)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._active or self._closing)
                if self._closing:
                    return
            try:
                self.round()
            except Exception as error:  # the decoder is in an unknown state
                self._break(error)
                self.on_failure(error)
                return

    def _break(self, error: Exception) -> None:
        """Ends everything without the decoder, after an error outside of what a single job or step can cause."""
        with self._changed:
            self._error = error
            for run in [*self._waiting, *self._active]:
                run.answer.close(_with_cause("the server", error))
            self._failed += len(self._waiting) + len(self._active)
            self._waiting.clear()
            self._active.clear()
            self._prefilling.clear()
            self._changed.notify_all()

    def _check(self, job: Job) -> int:
        """The most new tokens of a job; raises ValueError if it can never run."""
        check_streamable(job.config)
        (ids,), _, (positions,) = checked_rows([job.ids], None, None, self._decoder.vocab_size)
        job.config.check_vocab_size(self._decoder.vocab_size)
        limit = int(new_token_limits([Prompt(ids, positions)], [job.config])[0])
        if len(ids) + limit > self._decoder.capacity:
            raise ValueError(
                f"prompt of {len(ids)} tokens and max_new_tokens = {limit} exceed the context of this server, "
                f"{self._decoder.capacity} tokens; shorten one"
            )
        if job.config.num_return_sequences > self._decoder.slots:
            raise ValueError(
                f"num_return_sequences = {job.config.num_return_sequences}: this server has {self._decoder.slots} slots"
            )
        return limit

    def _queued(self, waiting: Sequence[_Run]) -> int:
        """How many of these jobs have no free slots now."""
        free = self._decoder.slots - sum(run.slots for run in self._active)
        for number, run in enumerate(waiting):
            free -= run.choices
            if free < 0:
                return len(waiting) - number
        return 0

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            for run in self._waiting:
                if run.answer is answer:  # its place in the queue is free at once
                    self._end(run, "cancelled")
                    return
            for run in self._active:
                run.cancelled = run.cancelled or run.answer is answer

    def _end_unwanted(self) -> None:
        now = time.monotonic()
        with self._changed:
            for run in [*self._waiting, *self._active]:
                if run.cancelled or run.overdue(now):
                    self._end(run, "cancelled" if run.cancelled else "timeout")

    def _admit(self) -> None:
        """Gives slots to the jobs that have waited longest."""
        with self._changed:
            while self._waiting:
                run, used = self._waiting[0], sum(run.slots for run in self._active)
                if used + run.choices > self._decoder.slots:
                    return
                try:
                    run.slot = self._decoder.open(run.job.ids, run.job.adapter)
                except NoRoom as error:
                    if self._active:
                        return
                    self._fail([run], error)  # not even alone
                except Exception as error:
                    self._fail([run], error)
                else:
                    self._waiting.popleft()
                    self._active.append(run)
                    self._prefilling.append(run)
                    run.started = time.monotonic()
                    run.answer.queue_seconds = run.started - run.arrived

    def _prefill(self) -> None:
        """Computes a chunk of one prompt; prompts take turns, so that a short one does not wait for a long one."""
        if not self._prefilling:
            return
        run = self._prefilling[0]
        self._prefilling.rotate(-1)
        try:
            if run.logits is None:
                self._run_chunk(run)
            if run.logits is not None:
                self._make_rows(run, run.logits)
        except Exception as error:
            self._fail([run], error)

    def _run_chunk(self, run: _Run) -> None:
        assert run.slot is not None
        if not run.job.prompt_logprobs:
            run.logits = self._decoder.prefill(run.slot)
            return
        chunk: Any = self._decoder.prefill(run.slot, all_logits=True)  # [tokens of the chunk, V]
        ids, scores = run.job.ids, run.prompt_scores
        for row in chunk:
            if len(scores) + 1 < len(ids):
                scores.append(_token_score(row, int(ids[len(scores) + 1]), run.job.logprobs or 0))
            else:
                run.logits = row
                run.answer.prompt_scores = scores

    def _make_rows(self, run: _Run, logits: np.ndarray) -> None:
        """Gives each choice its slot and chooses its first token from logits float32 [V]."""
        job, slot = run.job, run.slot
        assert slot is not None
        samplers = row_samplers([np.asarray(job.ids)], [job.config], logits.size)
        guides = [None if job.guide is None else job.guide() for _ in samplers]
        try:
            others = self._decoder.fork([slot] * (run.choices - 1)) if run.choices > 1 else []
        except NoRoom:
            if any(other.rows for other in self._active):
                return  # try again when others have ended
            raise
        run.answer.cached_tokens = cached = self._decoder.cached(slot)
        self._tokens.update(prompt=len(job.ids), cached=cached)
        self._prefilling.remove(run)
        for choice, own in enumerate(zip([slot, *others], samplers, guides)):
            run.rows.append(_Row(run, choice, *own, AnswerText(self._tokenizer, job.stop, job.include_stop)))
        run.slot = None
        for row in [*run.rows]:
            self._take(row, logits)
            most, limit = job.config.prompt_lookup_num_tokens, len(job.ids) + run.limit
            row.lookup = self._speculation.lookup([*job.ids, row.token], most, limit)

    def _step(self) -> None:
        """Computes the next token of every choice, and of some more than one."""
        rows = [row for run in self._active for row in run.rows]
        if not rows:
            return
        try:
            step = self._speculation.step([Row(row.slot, row.token, row.lookup) for row in rows])
        except Exception as error:
            self._fail(list(dict.fromkeys(row.run for row in rows)), error, "the step of the whole batch")
            return
        for number, row in enumerate(rows):
            if row not in row.run.rows:  # another choice of its job has failed
                continue
            try:
                self._take_all(step, number, row)
            except Exception as error:
                self._fail([row.run], error)

    def _take_all(self, step: Step, number: int, row: _Row) -> None:
        """Chooses the next tokens of a choice, which is row `number` of a step."""
        scores: np.ndarray | None = step.scores[number]
        while scores is not None:
            self._take(row, scores)
            scores = step.after(number, row.token) if row in row.run.rows else None
        self._speculation.settle(step, number, runs=row in row.run.rows)

    def _take(self, row: _Row, scores: np.ndarray) -> None:
        """Chooses the next token of a choice from scores float32 [V], and sends what is news."""
        job = row.run.job
        row.token = token = row.sampler(scores, None if row.guide is None else row.guide.mask())
        row.unsent.append(
            TokenScore(token, math.nan, ()) if job.logprobs is None else _token_score(scores, token, job.logprobs)
        )
        row.count += 1
        self._tokens["generated"] += 1
        text, finish = "", None
        reason: str | int | None = None
        if token in job.config.eos_ids:
            finish, reason = "stop", token
        else:
            text = row.text.push(token, search=row.count > job.config.min_new_tokens)
            if row.guide is not None:
                row.guide.accept(token)
            if row.text.stopped is not None:
                finish, reason = "stop", row.text.stopped
            elif row.guide is not None and row.guide.finished():
                finish = "stop"
            elif row.count == row.run.limit:
                finish = "length"
        if finish is not None:
            self._finish(row, finish, reason, text)
        elif text:
            self._send(row, text)

    def _send(self, row: _Row, text: str, finish: str | None = None, reason: str | int | None = None) -> None:
        tokens, row.unsent = tuple(row.unsent), []
        row.run.answer.put(Event(row.choice, text, tokens, finish, reason))

    def _finish(self, row: _Row, finish: str, reason: str | int | None = None, text: str = "") -> None:
        """Ends a choice, and its job with the last one."""
        run = row.run
        run.rows.remove(row)
        self._decoder.free([row.slot])
        stopped = row.text.stopped
        text += row.text.flush()
        if stopped is None and row.text.stopped is not None:  # the last characters complete a stop string
            finish, reason = "stop", row.text.stopped
        with self._changed:  # before the client knows: who asks for the numbers then finds its answer among them
            self._finished[finish] += 1
        self._send(row, text, finish, reason)
        if not run.rows:
            self._close(run)

    def _end(self, run: _Run, finish: str) -> None:
        """Ends all that is left of a job, wherever it is."""
        with self._changed:
            for row in [*run.rows]:
                self._finish(row, finish)
            if run.slot is not None or run in self._waiting:
                self._finished[finish] += run.choices
                for choice in range(run.choices):
                    run.answer.put(Event(choice, "", (), finish))
                self._close(run)

    def _fail(self, runs: Sequence[_Run], error: Exception, what: str = "") -> None:
        """Ends jobs whose `events` raise `error`; one of its own for each if it concerns several."""
        for run in runs:
            self._failed += 1
            slots, run.rows = [row.slot for row in run.rows], []
            self._decoder.free(slots)
            self._close(run, _with_cause(what, error) if what else error)

    def _close(self, run: _Run, error: Exception | None = None) -> None:
        with self._changed:
            if run.slot is not None:
                self._decoder.free([run.slot])
                run.slot = None
            if run in self._waiting:
                self._waiting.remove(run)
            else:
                self._active.remove(run)
                self._mean_seconds += _NEWEST * (time.monotonic() - run.started - self._mean_seconds)
            if run in self._prefilling:
                self._prefilling.remove(run)
            self._changed.notify_all()
        run.answer.close(error)


def _with_cause(what: str, error: Exception) -> Exception:
    """An error of its own for each of the answers that end by the same one."""
    own = RuntimeError(f"{what} failed: {type(error).__name__}: {error}")
    own.__cause__ = error
    return own


def _token_score(scores: np.ndarray, token: int, count: int) -> TokenScore:
    """The log-probability of a token by scores float32 [V], and the `count` likeliest tokens with theirs."""
    logprobs = log_softmax(scores[None])[0]
    best: Any = largest(logprobs, count) if count else ()
    return TokenScore(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in best))
