"""From scores to tokens: repetition penalty, temperature, top-k, top-p, and seeded draws.

The rules, their order and their float32 arithmetic are those of transformers 4.41.2 (`LogitsProcessor` and
`LogitsWarper`), so that the same scores keep the same tokens. A filter maps scores to scores; removed tokens get -inf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Callable

import numpy as np

from glm_ms.generation.config import GenerationConfig

# (scores float32 [B, V], seen bool [B, V]; None without a repetition penalty) -> scores float32 [B, V]
ScoreFilter = Callable[[np.ndarray, Any], np.ndarray]

_FALLBACK_TOKEN, _FALLBACK_SCORE = 5, 5e4
# How many of the best scores top-p looks at first; distributions of language models rarely need more.
_TOP_P_FIRST_LOOK = 512


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
        self._row, self._step = row, 0
        self._filters = build_filters(config)
        self._seen = mark_seen([prompt], vocab_size) if config.repetition_penalty != 1 else None
        self._generator = generator

    def __call__(self, scores: np.ndarray) -> int:
        """The next token from scores float32 [V]; raises as `check_scores`."""
        if not self.config.replace_invalid_scores:
            check_scores(scores[None], self._step, self._row)
        self._step += 1
        filtered = apply_filters(self._filters, scores[None], self._seen)[0]
        token = draw(filtered, self._generator) if self.config.do_sample else int(filtered.argmax())
        if self._seen is not None:
            self._seen[0, token] = True
        return token


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
    counts: Counter[tuple[int, bytes]] = Counter()
    samplers: list[RowSampler] = []
    for prompt, config in zip(prompts, configs):
        key = (configs.index(config), prompt.tobytes())
        for _ in range(config.num_return_sequences):
            generator = row_generator(prompt, config.seed, counts[key])
            samplers.append(RowSampler(config, prompt, vocab_size, generator, len(samplers)))
            counts[key] += 1
    return samplers


def row_generator(prompt: np.ndarray, seed: int | None, copy: int) -> np.random.Generator:
    """The random stream of copy number `copy` of a prompt; seed None takes fresh entropy from the system."""
    entropy: Any = np.random.SeedSequence().entropy if seed is None else int(seed)
    # The length distinguishes prompts that differ by trailing zeros only.
    words = np.array([len(prompt), *prompt], np.uint32)
    sequence = np.random.SeedSequence([entropy, words], spawn_key=(copy,))
    return np.random.Generator(np.random.PCG64(sequence))


def build_filters(config: GenerationConfig) -> list[ScoreFilter]:
    """The filters of a config, in order; often none. The last three act in sampling only."""
    filters: list[ScoreFilter] = []
    if config.repetition_penalty != 1:
        filters.append(lambda scores, seen: penalize_repetition(scores, seen, config.repetition_penalty))
    if config.replace_invalid_scores:
        filters.append(lambda scores, seen: replace_invalid_scores(scores))
    if config.do_sample and config.temperature != 1:
        filters.append(lambda scores, seen: scores / np.float32(config.temperature))
    if config.do_sample and config.top_k:
        filters.append(lambda scores, seen: keep_top_k(scores, config.top_k))
    if config.do_sample and config.top_p < 1:
        filters.append(lambda scores, seen: keep_top_p(scores, config.top_p))
    return filters


def apply_filters(filters: Sequence[ScoreFilter], scores: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Runs scores float32 [B, V] through `filters`; `seen` bool [B, V] as in `mark_seen`."""
    for one in filters:
        scores = one(scores, seen)
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
    rows, ids = np.nonzero(seen)
    chosen = scores[rows, ids]
    penalty32 = np.float32(penalty)
    scores = scores.copy()
    scores[rows, ids] = np.where(chosen < 0, chosen * penalty32, chosen / penalty32)
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
    kth = scores.shape[1] - min(k, scores.shape[1])
    threshold = np.partition(scores, kth, axis=1)[:, kth, None]
    return np.where(scores < threshold, np.float32(-np.inf), scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Removes the least likely tokens of scores float32 [B, V] that together reach at most 1 - p.

    The token that crosses p stays, so at least one does. Tokens tied with the last one kept stay too (the
    original keeps some of them, which ones is left to an unstable sort).
    """
    threshold = np.array([_top_p_threshold(row, p) for row in scores], scores.dtype)
    return np.where(scores < threshold[:, None], np.float32(-np.inf), scores)


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
        best = np.sort(np.partition(row, row.size - look)[row.size - look :])
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
