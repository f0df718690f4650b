"""Proposals in the scheduler: the same events as without, for choices, grammars, stops, scores and failures."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from serve.fakes import FakeDecoder, collected

from glm_ms.generation import speculation
from glm_ms.generation.config import GenerationConfig
from glm_ms.serve.scheduler import Job, Scheduler


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Proposals cost nearly nothing, whatever the clock says."""
    monkeypatch.setattr(speculation._Cost, "price", lambda self: 0.02)


def repeating(vocab_size: int, noise: float = 0.6):
    """`scores` of a network whose last token nearly determines the next one, mostly one of forty."""
    rare = np.where(np.arange(vocab_size) < 40, np.float32(0), np.float32(8))

    def numbers(key: object) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(vocab_size, np.float32)

    return lambda ids, adapter: numbers(ids[-1:]) * 3 + numbers((ids, adapter)) * np.float32(noise) - rare


class Alternating:
    """A grammar: an id of another parity after each id; an end after twelve."""

    def __init__(self, vocab_size: int) -> None:
        self.places, self.count, self.parity = np.arange(vocab_size), 0, 0

    def mask(self) -> np.ndarray:
        return self.places % 2 == self.parity

    def accept(self, token: int) -> None:
        assert token % 2 == self.parity
        self.count, self.parity = self.count + 1, 1 - self.parity

    def finished(self) -> bool:
        return self.count == 30


def jobs(vocab_size: int) -> list[Job]:
    """Jobs that differ in everything."""
    found = []
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.9}
    for number in range(24):
        generator = np.random.default_rng(number)
        ids = generator.integers(3, vocab_size, generator.integers(1, 12)).tolist()
        options = [
            {},
            {**sampled, "seed": number, "num_return_sequences": 1 + number % 3},
            {**sampled, "seed": 7, "presence_penalty": 0.2, "frequency_penalty": 0.1},
            {"repetition_penalty": 1.1, "eos_token_id": list(range(0, vocab_size, 9))},
        ][number % 4]
        guide = (lambda: Alternating(vocab_size)) if number % 5 == 1 else None
        config = GenerationConfig(20 + number, **options)
        found.append(Job(ids, config, adapter="a" if number % 7 == 0 else None, logprobs=number % 3 or None,
                         stop=("e",) if number % 6 == 2 else (), guide=guide))  # fmt: skip
    return found


def run(decoder: FakeDecoder, tokenizer, some: list[Job]) -> tuple[list[dict], Scheduler]:
    """For each job, by choice: text, tokens with their scores, end and its reason."""
    scheduler = Scheduler(decoder, tokenizer)
    answers = []
    for job in some:
        answers.append(scheduler.submit(job))
        scheduler.round()
    for _ in range(3000):
        if not scheduler.round():
            break
    return [collected(answer) for answer in answers], scheduler


def decoder_of(vocab_size: int, exact_rows: bool, noise: float = 0.6) -> FakeDecoder:
    decoder = FakeDecoder(vocab_size, scores=repeating(vocab_size, noise), capacity=96)
    decoder.exact_rows = exact_rows
    return decoder


def test_every_job_gets_what_it_gets_without(tokenizer):
    size = tokenizer.vocab_size
    plain, fast = decoder_of(size, False), decoder_of(size, True)
    some = jobs(size)
    wanted, _ = run(plain, tokenizer, some)
    found, scheduler = run(fast, tokenizer, some)
    assert found == wanted
    assert not fast.running
    assert {call[0] for call in fast.calls} >= {"extend", "truncate"}
    totals = scheduler.stats.speculation
    assert totals.proposals > 20
    assert totals.accepted > 20
    assert totals.proposed == sum(len(some) - 1 for call in fast.calls if call[0] == "extend" for some in call[2])


def test_a_grammar_is_followed_within_a_proposal(tokenizer):
    size = tokenizer.vocab_size
    job = Job([5, 8], GenerationConfig(60), guide=lambda: Alternating(size))
    wanted, _ = run(decoder_of(size, False, noise=0), tokenizer, [job])
    found, scheduler = run(decoder_of(size, True, noise=0), tokenizer, [job])
    assert found == wanted
    assert "'stop', None" in found[0][0]
    assert scheduler.stats.speculation.accepted > 3


def test_a_job_without_proposals(tokenizer):
    decoder = decoder_of(tokenizer.vocab_size, True, noise=0)
    run(decoder, tokenizer, [Job([5, 8], GenerationConfig(60, prompt_lookup_num_tokens=0))])
    assert "extend" not in {call[0] for call in decoder.calls}


def test_nan_behind_a_wrong_proposal_harms_nobody_and_at_a_right_one_its_job_alone(tokenizer):
    size = tokenizer.vocab_size
    usual = repeating(size, noise=0)

    def broken(ids, adapter):
        scores = usual(ids, adapter)
        return scores * np.float32(np.nan) if adapter == "a" and len(ids) > 60 else scores

    decoder = decoder_of(size, True)
    decoder._scores = broken
    scheduler = Scheduler(decoder, tokenizer)
    good, bad = (scheduler.submit(Job([5, 8], GenerationConfig(80), adapter=name)) for name in (None, "a"))
    for _ in range(200):
        if not scheduler.round():
            break
    assert sum(len(event.tokens) for event in good.events()) == 80
    with pytest.raises(FloatingPointError, match="nan or inf"):
        list(bad.events())
    assert not decoder.running
