"""Steps of several tokens: the same answers as without, fewer steps, and no loss where proposals fail."""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest
from slot_decoder import SlotDecoder

from glm_ms.generation import speculation
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decode import answers, generate, stream
from glm_ms.generation.inputs import prepare_prompts
from glm_ms.generation.speculation import Row, Speculation

VOCABULARY = 40
EVERY_WAY = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "bias": {"logit_bias": {5: 2.0, 7: -3.0}, "min_new_tokens": 6},
    "sampled": {"do_sample": True, "temperature": 0.6, "seed": 3},
    "filters": {"do_sample": True, "temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "seed": 4},
    "several": {"do_sample": True, "temperature": 0.7, "seed": 5, "num_return_sequences": 3},
    "several with penalties": {
        "do_sample": True, "temperature": 0.5, "repetition_penalty": 1.1, "seed": 6, "num_return_sequences": 2,
    },
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}  # fmt: skip


class Repeating(SlotDecoder):
    """A network whose text often repeats itself: the last token nearly determines the next one. Ends are seldom.

    `noise` is the weight of the rest of the sequence. Rows of one token and of several have the same bits.
    """

    vocab_size = VOCABULARY

    def __init__(self, exact_rows: bool, noise: float = 0.6) -> None:
        super().__init__()
        self.exact_rows, self.noise, self.runs = exact_rows, noise, []

    def scores(self, rows):
        found = [_numbers(row.ids[-1:]) * 3 + _numbers(row.ids) * np.float32(self.noise) for row in rows]
        return np.stack(found) - _RARE

    def step(self, slots, tokens):
        self.runs.append(len(slots))
        return super().step(slots, tokens)

    def extend(self, slots, tokens):
        self.runs.append(sum(map(len, tokens)))
        return super().extend(slots, tokens)


_RARE = np.where(np.arange(VOCABULARY) < 3, np.float32(2), np.float32(0))


def _numbers(ids) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(repr(list(ids)).encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(VOCABULARY, np.float32)


def prompts(count: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, VOCABULARY, generator.integers(1, 30)).tolist() for _ in range(count)]
    return prepare_prompts(ids, vocab_size=VOCABULARY)


@pytest.fixture
def cheap(monkeypatch):
    """Proposals cost nearly nothing, whatever the clock says."""
    monkeypatch.setattr(speculation._Cost, "price", lambda self: 0.02)


@pytest.mark.parametrize("options", EVERY_WAY.values(), ids=EVERY_WAY)
def test_answers_are_those_without(options, cheap):
    config = GenerationConfig(60, eos_token_id=[1, 2], **options)
    plain, fast = Repeating(exact_rows=False), Repeating(exact_rows=True)
    wanted = generate(plain, prompts(8), [config] * 8)
    assert generate(fast, prompts(8), [config] * 8) == wanted
    assert not fast.rows
    assert "extend" not in plain.calls
    if options.get("num_beams"):
        assert "extend" not in fast.calls, "beams change places"
    else:
        assert {"extend", "truncate"} <= set(fast.calls)


def test_a_prompt_needs_fewer_steps_alone(cheap):
    inputs, config = prompts(6), GenerationConfig(60)
    plain, fast = Repeating(exact_rows=False, noise=0.3), Repeating(exact_rows=True, noise=0.3)
    for prompt in inputs:
        assert generate(fast, [prompt], [config]) == generate(plain, [prompt], [config])
    assert len(fast.runs) < 0.7 * len(plain.runs)


def test_a_batch_of_different_configs(cheap):
    """Prompts that join when others leave, each with its own options and limit."""
    configs = [
        GenerationConfig(5 + 7 * number, eos_token_id=1, prompt_lookup_num_tokens=number % 4 * 3, **options)
        for number, options in enumerate(EVERY_WAY.values())
    ]
    found = []
    for exact in (False, True):
        decoder = Repeating(exact)
        decoder.slots = 4
        found.append(sorted(answers(decoder, prompts(len(configs), seed=1), configs)))
        assert not decoder.rows
    assert found[0] == found[1]


@pytest.mark.parametrize(("number", "most"), [*product(range(4), (1, 3, 10))])
def test_a_stream_is_that_without(number, most, cheap):
    options = [*EVERY_WAY.values()][number]
    config = GenerationConfig(30, eos_token_id=[1, 2], pad_token_id=0, prompt_lookup_num_tokens=most, **options)
    inputs = prompts(3, seed=number)
    steps = [np.stack(list(stream(Repeating(exact), inputs, [config] * 3))).tolist() for exact in (False, True)]
    assert steps[0] == steps[1]


def test_a_stream_computes_when_a_token_is_needed(cheap):
    decoder = Repeating(exact_rows=True, noise=0)
    config = GenerationConfig(60)
    tokens, runs = stream(decoder, prompts(1), [config]), []
    for _ in tokens:
        runs.append(len(decoder.runs))
    assert runs[:2] == [0, 1]
    assert len(set(runs)) < len(runs) - 20, "several tokens of a run"


def test_switched_off_by_0(cheap):
    decoder = Repeating(exact_rows=True)
    generate(decoder, prompts(3), [GenerationConfig(20, prompt_lookup_num_tokens=0)] * 3)
    assert "extend" not in decoder.calls


@pytest.mark.parametrize("value", [-1, 2.5, True, "10"])
def test_unusable_values_are_refused(value):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens = "):
        GenerationConfig(5, prompt_lookup_num_tokens=value)


class Timed:
    """A decoder whose steps take `fixed` seconds and `each` for every token, on its own clock."""

    exact_rows = True

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each, self.now, self.run, self.ids = fixed, each, 0.0, [], list[int]()

    def clock(self) -> float:
        return self.now

    def _spend(self, tokens: int) -> np.ndarray:
        self.now += self.fixed + self.each * tokens
        self.run.append(tokens)
        return np.zeros((tokens, VOCABULARY), np.float32)

    def step(self, slots, tokens):
        return self._spend(len(slots))

    def extend(self, slots, tokens):
        scores = self._spend(sum(map(len, tokens)))
        return np.split(scores, np.cumsum([len(some) for some in tokens])[:-1])

    def truncate(self, slot, count):
        assert count > 0


def loop(decoder: Timed, text: list[list[int]], most: int = 10) -> float:
    """Decodes texts that are known before, one for each slot; returns the seconds."""
    one = Speculation(decoder, decoder.clock)
    places = [1] * len(text)
    lookups = [one.lookup(ids[:1], most, len(ids)) for ids in text]
    while any(place < len(ids) for place, ids in zip(places, text)):
        running = [number for number, ids in enumerate(text) if places[number] < len(ids)]
        step = one.step([Row(number, text[number][places[number] - 1], lookups[number]) for number in running])
        for number, index in enumerate(running):
            runs = True
            while runs:
                token = text[index][places[index]]
                places[index] += 1
                runs = places[index] < len(text[index])
                if runs and step.after(number, token) is None:
                    break
            one.settle(step, number, runs)
    return decoder.now


def text_of(length: int, seed: int, repeats: float) -> list[int]:
    """Random tokens; a share of them begins a copy of twelve earlier ones."""
    generator, ids = np.random.default_rng(seed), list(range(20))
    while len(ids) < length:
        if generator.random() < repeats:
            start = int(generator.integers(0, len(ids) - 12))
            ids += ids[start : start + 12]
        ids.append(int(generator.integers(0, VOCABULARY)))
    return ids[:length]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("each", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("repeats", [0.0, 0.1, 0.5])
def test_never_slower_by_more_than_a_few_percent(rows, each, repeats):
    """Whatever a token costs beside a step (1 second), and however seldom a proposal is right."""
    text = [text_of(400, seed, repeats) for seed in range(rows)]
    without = loop(Timed(1.0, each), text, most=0)
    assert loop(Timed(1.0, each), text) < 1.03 * without


@pytest.mark.parametrize("rows", [1, 4])
def test_faster_where_a_text_repeats_itself(rows):
    text = [text_of(400, seed, 0.5) for seed in range(rows)]
    without, faster = (loop(Timed(1.0, 0.02), text, most) for most in (0, 10))
    assert faster < 0.6 * without


def test_what_a_compilation_took_is_no_price():
    decoder = Timed(1.0, 0.3)
    decoder.now, real, first = 0.0, decoder._spend, True

    def spend(tokens):
        nonlocal first
        decoder.now += 100 * first
        first = False
        return real(tokens)

    decoder._spend = spend
    text = [text_of(400, 1, 0.1)]
    without = loop(Timed(1.0, 0.3), text, most=0)
    assert loop(decoder, text) - 100 < 1.03 * without


def test_totals_count_what_was_right():
    decoder = Timed(1.0, 0.001)
    one = Speculation(decoder, decoder.clock)
    text = list(range(8)) * 20
    lookup, place = one.lookup(text[:1], 10, len(text)), 1
    while place < len(text):
        step = one.step([Row(0, text[place - 1], lookup)])
        following = step.scores[0]
        while following is not None and place < len(text):
            place += 1
            following = step.after(0, text[place - 1]) if place < len(text) else None
        one.settle(step, 0, runs=place < len(text))
    totals = one.totals
    assert totals.accepted == len(text) - 1 - len(decoder.run)
    assert 0 < totals.accepted <= totals.proposed
    assert totals.proposals == sum(tokens > 1 for tokens in decoder.run)
