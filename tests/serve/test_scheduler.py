"""The scheduler over a fake decoder: who runs when, what each request gets, and who fails."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from marks import slow_unless
from serve.fakes import FakeDecoder, scripted

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.pages import NoRoom
from glm_ms.generation.sampling import log_softmax
from glm_ms.serve.scheduler import Job, QueueFull, Scheduler, Stopped

SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "seed": 7}


def greedy(new: int = 4, **options) -> GenerationConfig:
    return GenerationConfig(new, **options)


def sampled(new: int = 4, **options) -> GenerationConfig:
    return GenerationConfig(new, **{**SAMPLED, **options})


def finish_all(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if not scheduler.round():
            return
    raise AssertionError("the jobs do not end")


def results(answer) -> dict[int, tuple]:
    """Choice -> text, tokens, finish, stop reason; checks that every choice ends once."""
    found: dict[int, tuple] = {}
    for event in answer.events():
        text, tokens, finish, _ = found.get(event.choice, ("", (), None, None))
        assert finish is None, "an event after the last one"
        found[event.choice] = text + event.text, tokens + event.tokens, event.finish, event.stop_reason
    assert all(one[2] for one in found.values())
    return found


def tokens_of(answer) -> list[int]:
    return [score.token for score in results(answer)[0][1]]


@pytest.fixture
def decoder(tokenizer):
    return FakeDecoder(tokenizer.vocab_size)


@pytest.fixture
def scheduler(decoder, tokenizer):
    return Scheduler(decoder, tokenizer, max_queue=64)


def mixed_jobs(tokenizer) -> list[Job]:
    """24 jobs that differ in everything."""
    jobs = []
    for number in range(24):
        generator = np.random.default_rng(number)
        ids = generator.integers(3, tokenizer.vocab_size, generator.integers(1, 40)).tolist()
        options = [
            {},
            {**SAMPLED, "num_return_sequences": 1 + number % 3},
            {**SAMPLED, "seed": number, "min_p": 0.05, "presence_penalty": 1.0},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "eos_token_id": list(range(60))},
        ][number % 4]
        config = GenerationConfig(1 + number % 11, **options)
        jobs.append(Job(ids, config, adapter="a" if number % 5 == 0 else None, logprobs=number % 3, stop=("e",)))
    return jobs


def test_a_job_gets_alone_what_it_gets_in_company(tokenizer):
    jobs, alone = mixed_jobs(tokenizer), []
    for job in jobs:
        single = Scheduler(FakeDecoder(tokenizer.vocab_size), tokenizer)
        answer = single.submit(job)
        finish_all(single)
        alone.append(results(answer))
    decoder = FakeDecoder(tokenizer.vocab_size, slots=5, chunk=64)
    together = Scheduler(decoder, tokenizer)
    answers = []
    for number, job in enumerate(jobs):  # they join while others run
        answers.append(together.submit(job))
        if number % 2:
            together.round()
    finish_all(together)
    assert [results(answer) for answer in answers] == alone
    assert not decoder.running
    assert max(len(slots) for name, slots in decoder.calls if name == "step") == 5
    assert len({str(one) for one in alone}) == len(alone)


def test_jobs_start_in_order_when_slots_are_free(scheduler, decoder):
    decoder.slots = 2
    answers = [scheduler.submit(Job([5 + number], greedy(2 + 2 * number))) for number in range(4)]
    finish_all(scheduler)
    order = [call for call in decoder.calls if call[0] in ("open", "free")]
    assert order == [
        ("open", 0), ("open", 1), ("free", 0), ("open", 0), ("free", 1), ("open", 1), ("free", 0), ("free", 1),
    ]  # fmt: skip
    assert [len(tokens_of(answer)) for answer in answers] == [2, 4, 6, 8]


def test_a_long_prompt_delays_a_stream_by_one_chunk_per_token(scheduler, decoder):
    stream = scheduler.submit(Job([5], greedy(20)))
    scheduler.round()
    scheduler.submit(Job(list(range(3, 43)), greedy(1)))  # five chunks
    decoder.calls.clear()
    finish_all(scheduler)
    kinds = [name for name, _ in decoder.calls if name in ("prefill", "step")]
    assert kinds[:10] == ["prefill", "step"] * 5
    assert len(tokens_of(stream)) == 20


def test_prompts_take_turns(scheduler, decoder):
    scheduler.submit(Job(list(range(3, 43)), greedy(1)))
    short = scheduler.submit(Job([5, 6], greedy(1)))
    scheduler.round()
    scheduler.round()
    assert tokens_of(short), "the short prompt waits for one chunk of the long one"
    assert [slot for name, slot in decoder.calls if name == "prefill"] == [0, 1]


def test_choices_share_the_prompt_and_differ(scheduler, decoder, tokenizer):
    answer = scheduler.submit(Job([5, 6, 7], sampled(6, num_return_sequences=3)))
    finish_all(scheduler)
    found = results(answer)
    assert sorted(found) == [0, 1, 2]
    assert len({one[0] for one in found.values()}) == 3
    assert [name for name, _ in decoder.calls].count("prefill") == 1
    assert ("fork", [0, 0]) in decoder.calls
    alone = Scheduler(FakeDecoder(tokenizer.vocab_size), tokenizer)
    one = alone.submit(Job([5, 6, 7], sampled(6)))
    finish_all(alone)
    assert results(one)[0] == found[0]


def test_a_choice_that_ends_frees_its_slot_before_the_others(scheduler, decoder, tokenizer):
    ends = list(range(tokenizer.vocab_size // 8))
    answer = scheduler.submit(Job([5, 6], sampled(40, num_return_sequences=4, eos_token_id=ends)))
    finish_all(scheduler)
    lengths = sorted(len(one[1]) for one in results(answer).values())
    assert lengths[0] < lengths[-1]
    steps = [len(slots) for name, slots in decoder.calls if name == "step"]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]


def test_a_cancelled_job_has_no_slot_at_the_next_step(scheduler, decoder):
    answers = [scheduler.submit(Job([5 + number], greedy(30))) for number in range(2)]
    for _ in range(3):
        scheduler.round()
    answers[0].cancel()
    before = len(decoder.calls)
    scheduler.round()
    assert decoder.calls[before:] == [("free", 0), ("step", [1])]
    _, tokens, finish, reason = results(answers[0])[0]
    assert (len(tokens), finish, reason) == (4, "cancelled", None)
    answers[0].cancel()  # once more changes nothing
    finish_all(scheduler)
    assert results(answers[1])[0][2] == "length"


def test_a_job_that_is_cancelled_in_its_prompt(scheduler, decoder):
    answer = scheduler.submit(Job(list(range(3, 43)), sampled(5, num_return_sequences=2)))
    scheduler.round()
    answer.cancel()
    finish_all(scheduler)
    assert [one[2] for one in results(answer).values()] == ["cancelled", "cancelled"]
    assert not decoder.running


def test_a_waiting_job_that_is_cancelled_leaves_its_place_at_once(scheduler, decoder, tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size, slots=1)
    scheduler = Scheduler(decoder, tokenizer, max_queue=0)  # none waits while the slot is taken
    first = scheduler.submit(Job([5], greedy()))
    with pytest.raises(QueueFull, match="1 requests wait already; try again in 1 s") as caught:
        scheduler.submit(Job([6], greedy()))
    assert caught.value.retry_after == 1
    first.cancel()
    assert results(first)[0] == ("", (), "cancelled", None)
    second = scheduler.submit(Job([6], greedy()))
    finish_all(scheduler)
    assert len(tokens_of(second)) == 4
    assert decoder.calls[0] == ("open", 0)
    assert scheduler.stats.finished == {"cancelled": 1, "length": 1}


def test_jobs_with_free_slots_are_not_in_the_queue(decoder, tokenizer):
    scheduler = Scheduler(decoder, tokenizer, max_queue=1)
    answers = [scheduler.submit(Job([5], sampled(3, num_return_sequences=3, seed=1)))]
    answers.append(scheduler.submit(Job([6], greedy(3, seed=2))))  # the last of four slots
    answers.append(scheduler.submit(Job([7], greedy(3, seed=3))))
    with pytest.raises(QueueFull):
        scheduler.submit(Job([8], greedy()))
    scheduler.round()
    with pytest.raises(QueueFull):
        scheduler.submit(Job([8], greedy()))
    finish_all(scheduler)
    assert [len(results(answer)) for answer in answers] == [3, 1, 1]


def test_a_reader_that_leaves_cancels(scheduler, decoder):
    answer = scheduler.submit(Job([5], greedy(30, seed=1)))
    for _ in range(5):
        scheduler.round()
    events = answer.events()
    next(events)
    events.close()
    finish_all(scheduler)
    assert not decoder.running
    assert scheduler.stats.finished == {"cancelled": 1}


@pytest.mark.parametrize("started", [False, True])
def test_time_limit(scheduler, decoder, started):
    answer = scheduler.submit(Job([5], greedy(60), seconds=0.02))
    other = scheduler.submit(Job([6], greedy(3), seconds=60.0))
    if started:
        scheduler.round()
    time.sleep(0.025)
    finish_all(scheduler)
    found = results(answer)[0]
    assert found[2] == "timeout"
    assert len(found[1]) == (2 if started else 0)
    assert results(other)[0][2] == "length"
    assert not decoder.running


def test_ends_and_reasons(tokenizer):
    answer_ids = tokenizer.encode("hello there dog", add_special_tokens=False)
    stop_id = tokenizer.eos_token_id
    script = scripted(tokenizer.vocab_size, [5, 6], [*answer_ids, stop_id])

    def run(**options):
        config = greedy(40, eos_token_id=[stop_id], min_new_tokens=options.pop("least", 0))
        scheduler = Scheduler(FakeDecoder(tokenizer.vocab_size, scores=script), tokenizer)
        answer = scheduler.submit(Job([5, 6], config, **options))
        finish_all(scheduler)
        text, tokens, finish, reason = results(answer)[0]
        return text, len(tokens), finish, reason

    whole = len(answer_ids) + 1
    assert run() == ("hello there dog", whole, "stop", stop_id)
    text, count, *end = run(stop=("there",))
    assert (text, *end) == ("hello ", "stop", "there")
    assert count < whole
    assert run(stop=("there",), include_stop=True)[0] == "hello there"
    assert run(stop=("there",), least=len(answer_ids)) == ("hello there dog", whole, "stop", stop_id)
    assert run(least=whole + 3)[1] == whole + 4, "no end token before min_new_tokens"


def test_emoji_come_whole(tokenizer):
    ids = tokenizer.encode("a😀👋🏽b", add_special_tokens=False)
    scheduler = Scheduler(FakeDecoder(tokenizer.vocab_size, scores=scripted(tokenizer.vocab_size, [5], ids)), tokenizer)
    answer = scheduler.submit(Job([5], greedy(len(ids))))
    finish_all(scheduler)
    parts = [event.text for event in answer.events()]
    assert "".join(parts) == "a😀👋🏽b"
    assert not any("\ufffd" in part for part in parts)
    assert {"😀", "👋"} <= set(parts)


def test_log_probabilities_are_those_of_the_unmodified_scores(scheduler, decoder):
    config = sampled(5, logit_bias={7: 50.0}, presence_penalty=1.0)
    answer = scheduler.submit(Job([5, 6], config, logprobs=3))
    finish_all(scheduler)
    ids = [5, 6]
    for score in results(answer)[0][1]:
        want = log_softmax(decoder._random(ids, None)[None])[0]
        assert score.logprob == float(want[score.token])
        best = sorted(range(want.size), key=lambda token: (-want[token], token))[:3]
        assert score.top == tuple((token, float(want[token])) for token in best)
        ids.append(score.token)
    assert ids[2:] == [7] * 5, "the bias decides"


def test_log_probabilities_of_the_prompt(scheduler, decoder):
    prompt = list(range(3, 24))
    plain = scheduler.submit(Job(prompt, greedy(1)))
    finish_all(scheduler)
    assert (plain.cached_tokens, plain.prompt_scores) == (0, None)
    again = scheduler.submit(Job(prompt, greedy(1)))
    answer = scheduler.submit(Job(prompt, greedy(1), logprobs=2, prompt_logprobs=True))
    short = scheduler.submit(Job([9], greedy(1), prompt_logprobs=True))
    finish_all(scheduler)
    assert again.cached_tokens == 16
    assert answer.cached_tokens == 0, "pages that are found have no logits"
    assert [score.token for score in answer.prompt_scores] == prompt[1:]
    for place, score in enumerate(answer.prompt_scores):
        want = log_softmax(decoder._random(prompt[: place + 1], None)[None])[0]
        assert score.logprob == float(want[prompt[place + 1]])
        assert len(score.top) == 2
    assert short.prompt_scores == []
    assert math.isnan(results(plain)[0][1][0].logprob)
    assert tokens_of(answer) == tokens_of(again)


class Letters:
    """A grammar: tokens of `allowed` in this order, then the end."""

    def __init__(self, size, allowed):
        self.size, self.allowed = size, list(allowed)

    def mask(self):
        mask = np.zeros(self.size, bool)
        mask[self.allowed[0]] = True
        return mask

    def accept(self, token):
        assert token == self.allowed.pop(0)

    def finished(self):
        return not self.allowed


def test_guides_hold_for_each_choice(scheduler, tokenizer):
    made = []

    def guide():
        made.append(Letters(tokenizer.vocab_size, [20 + len(made), 30, 31]))
        return made[-1]

    answer = scheduler.submit(Job([5], sampled(9, num_return_sequences=2), guide=guide))
    free = scheduler.submit(Job([5], greedy(9)))
    finish_all(scheduler)
    found = results(answer)
    assert [[score.token for score in found[choice][1]] for choice in (0, 1)] == [[20, 30, 31], [21, 30, 31]]
    assert [one[2:] for one in found.values()] == [("stop", None)] * 2
    assert len(tokens_of(free)) == 9


def test_a_guide_that_fails_ends_its_own_job_only(scheduler, decoder, tokenizer):
    class Wrong(Letters):
        def mask(self):
            return np.zeros(self.size, bool) if len(self.allowed) == 1 else super().mask()

    bad = scheduler.submit(Job([5], greedy(9), guide=lambda: Wrong(tokenizer.vocab_size, [20, 21])))
    short = scheduler.submit(Job([5], greedy(9), guide=lambda: Letters(3, [1])))
    good = scheduler.submit(Job([6], greedy(9)))
    finish_all(scheduler)
    with pytest.raises(ValueError, match="grammar: it allows no token here"):
        list(bad.events())
    with pytest.raises(ValueError, match="grammar: a mask for 3 tokens, the network has"):
        list(short.events())
    assert len(tokens_of(good)) == 9
    assert not decoder.running


def test_a_prompt_that_fails_ends_its_own_job_only(scheduler, decoder):
    decoder.broken = {1}
    good, bad, unknown = (
        scheduler.submit(Job(ids, greedy(5), adapter=name))
        for ids, name in (([5], None), ([6], None), ([7], "unknown"))
    )
    finish_all(scheduler)
    assert len(tokens_of(good)) == 5
    with pytest.raises(RuntimeError, match="1 is broken"):
        list(bad.events())
    with pytest.raises(ValueError, match="adapter 'unknown': not loaded"):
        list(unknown.events())
    assert not decoder.running
    assert scheduler.stats.failed == 2


def test_a_step_that_fails_ends_the_jobs_in_it(scheduler, decoder):
    running = [scheduler.submit(Job([5 + number], greedy(9))) for number in range(2)]
    scheduler.round()
    scheduler.round()
    later = scheduler.submit(Job(list(range(3, 33)), greedy(5)))
    decoder.broken = {"step"}
    scheduler.round()
    decoder.broken = set()
    finish_all(scheduler)
    errors = []
    for answer in running:
        with pytest.raises(RuntimeError, match="the step of the whole batch failed: RuntimeError: step is broken") as e:
            list(answer.events())
        errors.append(e.value)
    assert errors[0] is not errors[1]
    assert len(tokens_of(later)) == 5
    assert not decoder.running


def test_nan_ends_its_own_job_only(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size)
    decoder._scores = lambda ids, adapter: decoder._random(ids, adapter) * (np.nan if ids[0] == 6 and ids[3:] else 1)
    scheduler = Scheduler(decoder, tokenizer)
    good, bad = (scheduler.submit(Job([first, 5], greedy(6))) for first in (5, 6))
    finish_all(scheduler)
    assert len(tokens_of(good)) == 6
    with pytest.raises(FloatingPointError, match="generated token 2"):
        list(bad.events())
    assert not decoder.running


def test_pages_that_are_not_free_are_waited_for(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size, pages=6)
    scheduler = Scheduler(decoder, tokenizer)
    first, second = (scheduler.submit(Job(list(range(3, 18)), greedy(3))) for _ in range(2))
    forked = scheduler.submit(Job(list(range(3, 14)), sampled(1, num_return_sequences=2)))
    impossible = scheduler.submit(Job(list(range(3, 33)), greedy(3)))
    finish_all(scheduler)
    assert tokens_of(first) == tokens_of(second)
    assert len(results(forked)) == 2
    with pytest.raises(NoRoom):
        list(impossible.events())


def test_choices_wait_for_pages_of_running_ones(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size, pages=6)
    scheduler = Scheduler(decoder, tokenizer)
    first = scheduler.submit(Job([5, 6, 7], greedy(4)))
    scheduler.round()
    forked = scheduler.submit(Job(list(range(3, 11)), sampled(1, num_return_sequences=2)))
    for _ in range(2):
        scheduler.round()
    third = scheduler.submit(Job(list(range(3, 15)), sampled(1, num_return_sequences=3)))  # too many even alone
    finish_all(scheduler)
    assert len(tokens_of(first)) == 4
    assert len(results(forked)) == 2
    with pytest.raises(NoRoom):
        list(third.events())
    assert not decoder.running


def disturbed_job(generator: np.random.Generator, vocab_size: int) -> tuple[Job, bool]:
    """A job, and whether it can fail by itself."""
    kind, size = generator.integers(8), int(generator.integers(1, 30))
    ids = generator.integers(10, vocab_size, size).tolist()
    config = sampled(int(generator.integers(1, 12)), num_return_sequences=int(generator.integers(1, 4)))
    if kind == 0:  # NaN on the way
        return Job([6, 5, 5], sampled(8, num_return_sequences=2)), True
    if kind == 1:
        return Job(ids, config, guide=lambda: Letters(vocab_size, [20, 21, 22])), False
    if kind == 2:
        return Job(ids, config, guide=lambda: Letters(3, [1])), True
    if kind == 3:
        return Job(ids, config, adapter="unknown"), True
    return Job(ids, config, logprobs=1, prompt_logprobs=bool(kind == 4)), False


@pytest.mark.parametrize("seed", slow_unless(range(5), range(100)))
def test_no_mixture_of_troubles_disturbs_others(tokenizer, seed):
    """Jobs that fail, are cancelled or wait for pages; the others get what they get alone, and nothing is left."""
    generator = np.random.default_rng(seed)

    def decoder(slots: int, pages: int) -> FakeDecoder:
        made = FakeDecoder(tokenizer.vocab_size, slots=slots, pages=pages)
        made._scores = lambda ids, adapter: made._random(ids, adapter) * (np.nan if ids[0] == 6 and ids[4:] else 1)
        return made

    shared = decoder(4, 30)
    scheduler = Scheduler(shared, tokenizer)
    jobs = [disturbed_job(generator, tokenizer.vocab_size) for _ in range(25)]
    answers, cancelled = [], set()
    for number, (job, _) in enumerate(jobs):
        answers.append(scheduler.submit(job))
        for _ in range(generator.integers(4)):
            scheduler.round()
        if generator.integers(3) == 0:
            chosen = int(generator.integers(number + 1))
            answers[chosen].cancel()
            cancelled.add(chosen)
    finish_all(scheduler)
    assert not shared.running
    assert shared.pages_used == 0
    compared = 0
    for number, ((job, may_fail), answer) in enumerate(zip(jobs, answers)):
        if may_fail:
            errors = ValueError, FloatingPointError
            with suppress(*errors) if number in cancelled else pytest.raises(errors):
                list(answer.events())
        elif number not in cancelled:
            single = Scheduler(decoder(4, 64), tokenizer)
            alone = single.submit(job)
            finish_all(single)
            assert results(answer) == results(alone)
            assert answer.prompt_scores == alone.prompt_scores
            compared += 1
    assert compared > 3
    stats = scheduler.stats
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Job([], greedy()), "input_ids: row 0 is empty"),
        (lambda: Job([5, 10**6], greedy()), "input_ids: row 0, place 1: id 1000000 is outside the vocabulary"),
        (lambda: Job([[5]], greedy()), "input_ids: row 0: expected a sequence of integers"),
        (lambda: Job([5] * 60, greedy(5)), "prompt of 60 tokens and max_new_tokens = 5 exceed the context .* 64"),
        (lambda: Job([5], sampled(5, num_return_sequences=5)), "num_return_sequences = 5: this server has 4 slots"),
        (lambda: Job([5], greedy(5, num_beams=2)), "num_beams = 2: beam search cannot be streamed"),
        (lambda: Job([5], greedy(5, eos_token_id=10**6)), "eos_token_id = 1000000"),
        (lambda: Job([5], greedy(5, max_length=1)), "max_length = 1"),
        (lambda: Job([5], greedy(5), stop=("a", "")), r"stop = \('a', ''\): expected texts"),
        (lambda: Job([5], greedy(5), stop="ab"), "stop = 'ab'"),
        (lambda: Job([5], greedy(5), logprobs=-1), "logprobs = -1"),
        (lambda: Job([5], greedy(5), seconds=0.0), "seconds = 0.0"),
    ],
)
def test_jobs_that_can_never_run_are_refused(scheduler, make, message):
    with pytest.raises(ValueError, match=message):
        scheduler.submit(make())
    assert not scheduler.round()


def test_the_longest_job_fills_its_slot(scheduler, decoder):
    answer = scheduler.submit(Job([5] * 60, greedy(4)))
    finish_all(scheduler)
    assert len(tokens_of(answer)) == 4


def test_numbers(scheduler, decoder):
    decoder.slots = 1
    for _ in range(3):
        scheduler.submit(Job(list(range(3, 23)), greedy(2)))
    scheduler.round()
    stats = scheduler.stats
    assert (stats.running, stats.waiting, stats.pages_total, stats.pages_used) == (1, 2, 64, 5)
    finish_all(scheduler)
    stats = scheduler.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (60, 32, 6)
    assert (stats.finished, stats.failed, stats.pages_used) == ({"length": 3}, 0, 0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "scheduler" in thread.name]


def test_the_thread_serves_many_readers_and_ends(scheduler, tokenizer):
    jobs = mixed_jobs(tokenizer)[:12]
    scheduler.start()
    assert scheduler.alive
    scheduler.start()  # a second call changes nothing
    assert len(threads()) == 1
    found: dict[int, dict] = {}

    def read(number: int) -> None:
        found[number] = results(scheduler.submit(jobs[number]))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert sorted(found) == list(range(12))
    scheduler.close()
    assert not threads()
    assert not scheduler.alive
    with pytest.raises(Stopped, match="is stopping"):
        scheduler.submit(jobs[0])
    scheduler.close()


def test_closing_cancels(scheduler, decoder):
    answers = [scheduler.submit(Job([5], greedy(60))) for _ in range(7)]
    scheduler.round()
    scheduler.close()
    assert [results(answer)[0][2] for answer in answers] == ["cancelled"] * 7
    assert not decoder.running


def test_draining_finishes_what_runs(scheduler):
    answers = [scheduler.submit(Job([5 + number], greedy(9))) for number in range(6)]
    scheduler.start()
    assert scheduler.drain(20)
    assert [results(answer)[0][2] for answer in answers] == ["length"] * 6
    with pytest.raises(Stopped):
        scheduler.submit(Job([5], greedy()))
    scheduler.close()


def test_draining_has_a_limit(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size, capacity=10**6)
    decoder._scores = lambda ids, adapter: np.eye(decoder.vocab_size, dtype=np.float32)[7]
    scheduler = Scheduler(decoder, tokenizer)
    answer = scheduler.submit(Job([5], greedy(10**5)))
    scheduler.start()
    assert not scheduler.drain(0.02)
    assert results(answer)[0][2] == "cancelled"
    scheduler.close()


def test_a_decoder_that_cannot_free_slots_stops_the_scheduler(scheduler, decoder):
    decoder.broken = {"free"}
    answers = [scheduler.submit(Job([5 + number], greedy(2))) for number in range(6)]
    scheduler.start()
    for answer in answers:
        with pytest.raises(RuntimeError, match="the server failed: RuntimeError: free is broken"):
            list(answer.events())
    with pytest.raises(Stopped, match="the server has failed: free is broken"):
        scheduler.submit(Job([5], greedy()))
    assert not scheduler.alive
    scheduler.close()
    assert not threads()


def test_asyncio_readers(scheduler, decoder, tokenizer):
    jobs = mixed_jobs(tokenizer)[:6]
    alone = []
    for job in jobs:
        single = Scheduler(FakeDecoder(tokenizer.vocab_size), tokenizer)
        answer = single.submit(job)
        finish_all(single)
        alone.append(results(answer))

    async def read(answer) -> dict[int, str]:
        texts: dict[int, str] = {}
        async for event in answer.aevents():
            texts[event.choice] = texts.get(event.choice, "") + event.text
        return texts

    async def main() -> list[dict[int, str]]:
        return await asyncio.gather(*(read(scheduler.submit(job)) for job in jobs))

    scheduler.start()
    found = asyncio.run(asyncio.wait_for(main(), 20))
    assert found == [{choice: one[0] for choice, one in whole.items()} for whole in alone]
    scheduler.close()


def test_an_asyncio_reader_that_is_cancelled_frees_its_slot(tokenizer):
    decoder = FakeDecoder(tokenizer.vocab_size, capacity=10**6)
    decoder._scores = lambda ids, adapter: np.eye(decoder.vocab_size, dtype=np.float32)[300]
    scheduler = Scheduler(decoder, tokenizer)
    scheduler.start()

    async def main() -> None:
        answer, seen = scheduler.submit(Job([5], greedy(10**5))), asyncio.Event()

        async def read() -> None:
            async for _ in answer.aevents():
                seen.set()

        task = asyncio.ensure_future(read())
        await seen.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert scheduler.drain(20)
    assert scheduler.stats.finished == {"cancelled": 1}
    scheduler.close()


def test_an_asyncio_reader_gets_the_error(scheduler, decoder):
    decoder.broken = {"prefill"}

    async def main() -> None:
        async for _ in scheduler.submit(Job([5], greedy())).aevents():
            pass

    scheduler.start()
    with pytest.raises(RuntimeError, match="prefill is broken"):
        asyncio.run(asyncio.wait_for(main(), 20))
    scheduler.close()


def test_memory_does_not_grow(tokenizer):
    scores = np.linspace(0, 1, tokenizer.vocab_size, dtype=np.float32)
    decoder = FakeDecoder(tokenizer.vocab_size, scores=lambda ids, adapter: scores)
    scheduler = Scheduler(decoder, tokenizer)

    def serve(count: int) -> int:
        for number in range(count):
            job = Job([5, 6 + number % 7], sampled(2, num_return_sequences=1 + number % 2), logprobs=1)
            answer = scheduler.submit(job)
            if number % 5 == 0:
                answer.cancel()
            finish_all(scheduler)
            list(answer.events())
        decoder.calls.clear()
        gc.collect()
        return sys.getallocatedblocks()

    before = serve(100)
    assert serve(1000) - before < 500, "less than a block of memory for each job"
