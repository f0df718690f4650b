"""From scores to tokens: bias and penalties, temperature, top-k, top-p, min-p, and seeded draws.

The rules, their order and their float32 arithmetic are those of transformers 4.41.2 (`LogitsProcessor` and
`LogitsWarper`; min-p: 4.42), so that the same scores keep the same tokens. The penalties of OpenAI's API, which
transformers lacks, follow its repetition penalty. A filter maps scores to scores; removed tokens get -inf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Callable

import numpy as np

from glm_ms.generation.config import GenerationConfig

# (scores float32 [B, V], what the rows contain so far) -> scores float32 [B, V]
ScoreFilter = Callable[[np.ndarray, "History"], np.ndarray]

_FALLBACK_TOKEN, _FALLBACK_SCORE = 5, 5e4
# How many of the best scores top-p looks at first; distributions of language models rarely need more.
_TOP_P_FIRST_LOOK = 512
# Values of which `kth_largest` takes the maximum.
_GROUP = 64


class History:
    """What the rows of a batch contain so far, as far as the filters of a config need it.

    Args:
        prompts: int [S] each, one for each row.

    Attributes:
        length: number of generated tokens.
        seen: bool [B, V], ids of prompt and generated tokens; None without a repetition penalty.
        counts: how often each row has generated an id; None without penalties of generated tokens.
    """

    def __init__(self, config: GenerationConfig, prompts: Sequence[np.ndarray], vocab_size: int) -> None:
        self.length = 0
        self.seen: Any = mark_seen(prompts, vocab_size) if config.repetition_penalty != 1 else None
        counted = config.presence_penalty or config.frequency_penalty
        self.counts: Any = [Counter[int]() for _ in prompts] if counted else None

    def append(self, tokens: Any, rows: np.ndarray | None = None) -> None:
        """Adds the next token of each row, int [B]; with `rows` row i continues what row rows[i] was (beams)."""
        self.length += 1
        if self.seen is not None:
            if rows is not None:
                self.seen = self.seen[rows]
            self.seen[np.arange(len(self.seen)), tokens] = True
        if self.counts is not None:
            if rows is not None:
                self.counts = [self.counts[row].copy() for row in rows]
            for counter, token in zip(self.counts, tokens):
                counter[int(token)] += 1


class RowSampler:
    """Chooses the tokens of one row by its own options; other rows have no influence.

    Args:
        prompt: int [S], for the repetition penalty.
        generator: random stream of the row.
        row: its number, for errors.
    """

    def __init__(
        self, config: GenerationConfig, prompt: np.ndarray, vocab_size: int, generator: np.random.Generator, row: int
    ) -> None:
        config.check_vocab_size(vocab_size)
        self.config = config
        self._row = row
        self._penalties, self._warpers = build_penalties(config), build_warpers(config)
        self._history = History(config, [prompt], vocab_size)
        self._generator = generator

    def __call__(self, scores: np.ndarray, mask: np.ndarray | None = None) -> int:
        """The next token.

        Args:
            scores: float32 [V].
            mask: bool [V], the tokens that a grammar allows; None: all. It precedes `min_new_tokens`, where the
                grammar allows nothing but an end.

        Raises:
            FloatingPointError: as `check_scores`.
            ValueError: the mask has another shape, or allows no token.
        """
        if not self.config.replace_invalid_scores:
            check_scores(scores[None], self._history.length, self._row)
        filtered = apply_filters(self._penalties, scores[None], self._history)
        if mask is not None:
            filtered = _masked(filtered, scores, mask)
        filtered = apply_filters(self._warpers, filtered, self._history)[0]
        token = draw(filtered, self._generator) if self.config.do_sample else int(filtered.argmax())
        self._history.append([token])
        return token


def _masked(filtered: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Removes the tokens that `mask` forbids from float32 [1, V]; `scores` are those before the penalties."""
    if mask.shape != scores.shape:
        raise ValueError(f"grammar: a mask for {mask.size} tokens, the network has {scores.size}")
    if not mask.any():
        raise ValueError("grammar: it allows no token here, not even the end; correct the grammar")
    removed = np.where(mask, filtered[0], np.float32(-np.inf))
    if removed.max() == -np.inf:  # min_new_tokens forbids the end, and the grammar everything else
        removed = np.where(mask, scores, np.float32(-np.inf))
    return removed[None]


def row_samplers(
    prompts: Sequence[np.ndarray], configs: Sequence[GenerationConfig], vocab_size: int
) -> list[RowSampler]:
    """`num_return_sequences` samplers for each prompt (int [S]), those of one prompt together.

    The random stream of a row is determined by the seed, the ids of the prompt and a counter: the return index of
    the sequence, which continues over copies of the same prompt and config in the batch. So a prompt draws what it
    draws alone, and a batch with the same prompt twice gives two different samples.

    Raises:
        ValueError: an end or padding id outside the vocabulary.
    """
    samplers: list[RowSampler] = []
    for prompt, config, copy in zip(prompts, configs, copy_numbers(prompts, configs)):
        for index in range(config.num_return_sequences):
            generator = row_generator(prompt, config.seed, copy + index)
            samplers.append(RowSampler(config, prompt, vocab_size, generator, len(samplers)))
    return samplers


def copy_numbers(prompts: Sequence[np.ndarray], configs: Sequence[GenerationConfig]) -> list[int]:
    """How many rows of the same prompt (int [S]) and config come before those of each prompt."""
    keys = [(configs.index(config), prompt.tobytes()) for prompt, config in zip(prompts, configs)]
    return rows_before(keys, [config.num_return_sequences for config in configs])


def rows_before(keys: Iterable[Hashable], rows: Iterable[int]) -> list[int]:
    """For each key, which has so many rows, the number of rows of equal keys before it."""
    counts: Counter[Hashable] = Counter()
    numbers = []
    for key, count in zip(keys, rows):
        numbers.append(counts[key])
        counts[key] += count
    return numbers


def row_generator(prompt: np.ndarray, seed: int | None, copy: int) -> np.random.Generator:
    """The random stream of copy number `copy` of a prompt; seed None takes fresh entropy from the system."""
    entropy: Any = np.random.SeedSequence().entropy if seed is None else int(seed)
    # The length distinguishes prompts that differ by trailing zeros only.
    words = np.array([len(prompt), *prompt], np.uint32)
    sequence = np.random.SeedSequence([entropy, words], spawn_key=(copy,))
    return np.random.Generator(np.random.PCG64(sequence))


def build_filters(config: GenerationConfig) -> list[ScoreFilter]:
    """The filters of a config, in order; often none."""
    return build_penalties(config) + build_warpers(config)


def build_penalties(config: GenerationConfig) -> list[ScoreFilter]:
    """The filters that act in all ways of decoding."""
    filters: list[ScoreFilter] = []
    if config.logit_bias:
        ids = np.fromiter(config.logit_bias, np.int64)
        bias = np.fromiter(config.logit_bias.values(), np.float32)
        filters.append(lambda scores, history: add_bias(scores, ids, bias))
    if config.repetition_penalty != 1:
        filters.append(lambda scores, history: penalize_repetition(scores, history.seen, config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        amounts = config.presence_penalty, config.frequency_penalty
        filters.append(lambda scores, history: penalize_generated(scores, history.counts, *amounts))
    if config.replace_invalid_scores:
        filters.append(lambda scores, history: replace_invalid_scores(scores))
    if config.min_new_tokens and config.eos_ids:
        least, ends = config.min_new_tokens, list(config.eos_ids)
        filters.append(lambda scores, history: remove(scores, ends) if history.length < least else scores)
    return filters


def build_warpers(config: GenerationConfig) -> list[ScoreFilter]:
    """The filters that act in sampling only."""
    filters: list[ScoreFilter] = []
    if not config.do_sample:
        return filters
    if config.temperature != 1:
        filters.append(lambda scores, history: scores / np.float32(config.temperature))
    if config.top_k:
        filters.append(lambda scores, history: keep_top_k(scores, config.top_k))
    if config.top_p < 1:
        filters.append(lambda scores, history: keep_top_p(scores, config.top_p))
    if config.min_p:
        filters.append(lambda scores, history: keep_min_p(scores, config.min_p))
    return filters


def apply_filters(filters: Sequence[ScoreFilter], scores: np.ndarray, history: History) -> np.ndarray:
    """Runs scores float32 [B, V] through `filters`."""
    for one in filters:
        scores = one(scores, history)
    return scores


def mark_seen(input_ids: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Which ids (int [S] each, without padding) occur in each row, for the repetition penalty: bool [B, vocab_size].

    Transformers also counts the ids of left padding, so that there a prompt in a batch differs from the prompt alone
    in the score of the padding id. Here padding does not count, and the two agree.
    """
    seen = np.zeros((len(input_ids), vocab_size), bool)
    for row, ids in zip(seen, input_ids):
        row[ids] = True
    return seen


def penalize_repetition(scores: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divides positive and multiplies negative scores float32 [B, V] of seen ids by `penalty`, once per distinct id."""
    penalty32, scores = np.float32(penalty), scores.copy()
    for row, own in zip(scores, seen):
        ids = np.flatnonzero(own)
        row[ids] = np.where(row[ids] < 0, row[ids] * penalty32, row[ids] / penalty32)
    return scores


def add_bias(scores: np.ndarray, ids: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Adds bias float32 [N] to the scores of ids int [N] in every row of float32 [B, V]."""
    scores = scores.copy()
    scores[:, ids] += bias
    return scores


def penalize_generated(
    scores: np.ndarray, counts: Sequence[Mapping[int, int]], presence: float, frequency: float
) -> np.ndarray:
    """Subtracts presence + frequency * count from the scores float32 [B, V] of the ids that a row has generated."""
    scores = scores.copy()
    for row, own in zip(scores, counts):
        ids, times = np.fromiter(own, np.int64), np.fromiter(own.values(), np.float32)
        row[ids] -= np.float32(presence) + np.float32(frequency) * times
    return scores


def remove(scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Removes ids from scores float32 [B, V]."""
    scores = scores.copy()
    scores[:, ids] = -np.inf
    return scores


def replace_invalid_scores(scores: np.ndarray) -> np.ndarray:
    """The rule of the original chat functions against overflow in half precision.

    If scores float32 [B, V] contain a nan or inf, all scores become 0 and those of id 5 become 5e4; otherwise they
    are returned as they are. The original runs one prompt; so B is one row, or the beams of one prompt.
    """
    if np.isfinite(scores).all():
        return scores
    replaced = np.zeros_like(scores)
    replaced[:, _FALLBACK_TOKEN] = _FALLBACK_SCORE
    return replaced


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Removes every score of float32 [B, V] below the k-th largest of its row; ties with it stay."""
    threshold = np.array([kth_largest(row, min(k, row.size)) for row in scores], scores.dtype)
    return np.where(scores < threshold[:, None], np.float32(-np.inf), scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Removes the least likely tokens of scores float32 [B, V] that together reach at most 1 - p.

    The token that crosses p stays, so at least one does. Tokens tied with the last one kept stay too (the
    original keeps some of them, which ones is left to an unstable sort).
    """
    threshold = np.array([_top_p_threshold(row, p) for row in scores], scores.dtype)
    return np.where(scores < threshold[:, None], np.float32(-np.inf), scores)


def keep_min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Removes the tokens of scores float32 [B, V] that are less likely than p times the likeliest of their row."""
    probabilities = softmax(scores)
    least = np.float32(p) * probabilities.max(axis=1, keepdims=True)
    return np.where(probabilities < least, np.float32(-np.inf), scores)


def _top_p_threshold(row: np.ndarray, p: float) -> np.floating:
    """The smallest score of float32 [V] that top-p keeps.

    Sorting a whole vocabulary costs time, so only the best scores are sorted; the probability of the others is summed
    in one piece, and more are sorted only if not all of those are removed.
    """
    row = row[row > -np.inf]
    weights = np.exp(row - row.max())
    normalizer = weights.sum()
    total = weights.sum(dtype=np.float64) / normalizer
    removed_mass = np.float32(1 - p)
    look = 0
    while True:
        look = min(max(_TOP_P_FIRST_LOOK, 16 * look), row.size)
        best = np.sort(row[row >= kth_largest(row, look)])[-look:]
        probabilities = np.exp(best - best[-1]) / normalizer
        tail = max(total - probabilities.sum(dtype=np.float64), 0.0) if look < row.size else 0.0
        if np.float32(tail) <= removed_mass:
            break
    # torch accumulates a float32 cumsum in float64 and rounds each partial sum.
    reached = (tail + np.cumsum(probabilities, dtype=np.float64)).astype(np.float32)
    return best[min(np.count_nonzero(reached <= removed_mass), look - 1)]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities float32 [B, V] of scores float32 [B, V]; -inf becomes 0."""
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log probabilities float32 [B, V] of scores float32 [B, V]."""
    with np.errstate(invalid="ignore"):  # an inf makes its row nan, which the caller's check answers
        shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kth_largest(values: np.ndarray, k: int) -> np.floating:
    """The k-th largest of [N], 1 <= k <= N.

    `np.partition` of a whole vocabulary takes a millisecond. So the values are first divided into groups: none of the k
    largest is below the k-th largest of the maxima of the groups.
    """
    groups = values.size // _GROUP
    if k <= groups:
        maxima = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        values = values[values >= np.partition(maxima, groups - k)[groups - k]]
    return np.partition(values, values.size - k)[values.size - k]


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest of [N], largest first; of equal ones the lower place comes first."""
    places = np.flatnonzero(values >= kth_largest(values, min(count, values.size)))
    return places[np.argsort(-values[places], kind="stable")[:count]]


def check_scores(scores: np.ndarray, step: int, first_row: int = 0) -> None:
    """Raises FloatingPointError if a row of float32 [B, V] has a nan, +inf, or nothing but -inf."""
    broken = np.flatnonzero(~np.isfinite(scores.max(axis=1)))
    if broken.size:
        raise FloatingPointError(
            f"generated token {step}: the scores of row {first_row + broken[0]} contain nan or inf; the weights are "
            "broken or the compute type overflows: try compute_dtype float32, or replace_invalid_scores = True"
        )


def draw(scores: np.ndarray, generator: np.random.Generator) -> int:
    """Draws a token from filtered scores float32 [V] with one uniform number; -inf is never drawn."""
    candidates = np.flatnonzero(scores > -np.inf)
    cumulative = np.cumsum(softmax(scores[None, candidates])[0], dtype=np.float64)
    # Below the total even after rounding, so that the search always ends on a candidate with weight.
    target = min(generator.random() * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(candidates[np.searchsorted(cumulative, target, side="right")])
