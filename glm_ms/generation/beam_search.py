"""Beam search with the rules of transformers 4.41.2.

Scores are sums of log probabilities (float32, as there) over generated tokens, the end token included;
hypotheses are ranked by sum / generated length ** length_penalty, the prompt not counted. One detail
differs on purpose: with several end ids a finished sequence ends with the id that was generated, where
transformers 4.41.2 always writes the first of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decoder import Decoder
from glm_ms.generation.inputs import Prompt, new_token_limits
from glm_ms.generation.sampling import (
    ScoreFilter,
    apply_filters,
    build_processors,
    check_scores,
    log_softmax,
    mark_seen,
)

# Sum of the copies of a prompt in its first step, when only one of the equal beams may continue.
_NOT_STARTED = np.float32(-1e9)


@dataclass(frozen=True)
class BeamHypothesis:
    """One result of beam search.

    Attributes:
        token_ids: the generated ids, the end token included, the prompt not.
        sum_log_probs: sum of their log probabilities (after the repetition penalty, if any).
        score: sum_log_probs / len(token_ids) ** length_penalty.
    """

    token_ids: list[int]
    sum_log_probs: float
    score: float


class FinishedHypotheses:
    """The best finished hypotheses of one prompt, at most `num_beams` of them."""

    def __init__(self, config: GenerationConfig) -> None:
        self.config = config
        self.hypotheses: list[BeamHypothesis] = []
        self.complete = False

    def add(self, token_ids: list[int], sum_log_probs: float) -> None:
        """Adds a hypothesis; of more than `num_beams` the worst one is dropped."""
        score = sum_log_probs / len(token_ids) ** self.config.length_penalty
        if len(self.hypotheses) == self.config.num_beams:
            worst = min(self.hypotheses, key=lambda one: one.score)
            if score <= worst.score:
                return
            self.hypotheses.remove(worst)
        self.hypotheses.append(BeamHypothesis(token_ids, sum_log_probs, score))

    def update_complete(self, best_sum_log_probs: float, generated_length: int) -> None:
        """Decides whether the search for this prompt ends.

        Args:
            best_sum_log_probs: the best candidate of this step.
            generated_length: tokens generated so far, those of this step included.
        """
        if self.complete or len(self.hypotheses) < self.config.num_beams:
            return
        attainable = best_sum_log_probs / generated_length**self.config.length_penalty
        worst = min(one.score for one in self.hypotheses)
        self.complete = self.config.early_stopping or worst >= attainable

    def best(self, count: int) -> list[BeamHypothesis]:
        """The `count` best, best first; of equal ones the one found later comes first."""
        return sorted(self.hypotheses, key=lambda one: one.score)[::-1][:count]


def beam_search(decoder: Decoder, prompts: Sequence[Prompt], config: GenerationConfig) -> list[list[BeamHypothesis]]:
    """Searches the best continuations of each prompt; prompts do not influence each other.

    Args:
        decoder: the network; it needs B * num_beams free slots.
        prompts: B prompts.
        config: `num_beams`, `num_return_sequences`, `length_penalty`, `early_stopping`, `max_new_tokens`,
            `max_length`, `eos_token_id`, `repetition_penalty` (on log probabilities, as transformers does here).

    Returns:
        For each prompt `num_return_sequences` hypotheses, best first.

    Raises:
        ValueError: an end or padding id outside the vocabulary, or nothing but end ids in it.
        FloatingPointError: the network returned nan or inf.
    """
    beams = config.num_beams
    used, scores = decoder.add(prompts)
    try:
        search = _Search(prompts, config, scores.shape[1])
        scores, slots = np.repeat(scores, beams, axis=0), np.repeat(used, beams)
        for step in range(search.limits.max()):
            if not config.replace_invalid_scores:
                check_scores(scores, step)
            rows, tokens = search.advance(scores)
            alive = np.repeat([not finished.complete for finished in search.finished], beams)
            if not alive.any():
                break
            if step == 0:  # all beams of a prompt continue the slot that has run it
                copies = alive & (np.arange(alive.size) % beams > 0)
                slots[copies] = decoder.fork(slots[copies].tolist())
            elif (rows[alive] != np.flatnonzero(alive)).any():
                decoder.reorder(slots[alive].tolist(), slots[rows[alive]].tolist())
            kept = slots[alive].tolist()
            decoder.free(sorted(set(used) - set(kept)))
            used = kept
            scores[alive] = decoder.step(used, tokens[alive])
    finally:
        decoder.free(used)
    return [finished.best(config.num_return_sequences) for finished in search.finished]


class _Search:
    """State of a running search: R = B * num_beams rows."""

    def __init__(self, prompts: Sequence[Prompt], config: GenerationConfig, vocab_size: int) -> None:
        config.check_vocab_size(vocab_size)
        if len(config.eos_ids) >= vocab_size:
            raise ValueError(f"eos_token_id: all {vocab_size} ids of the vocabulary end a sequence")
        self.config = config
        self.finished = [FinishedHypotheses(config) for _ in prompts]
        self.limits = new_token_limits(prompts, [config] * len(prompts))
        self.generated = np.empty((len(prompts) * config.num_beams, 0), np.int32)
        self.sums = np.full((len(prompts), config.num_beams), _NOT_STARTED, np.float32)
        self.sums[:, 0] = 0
        self.filters: list[ScoreFilter] = build_processors(config)
        self.seen: np.ndarray | None = None
        if config.repetition_penalty != 1:
            ids = [prompt.ids for prompt in prompts]
            self.seen = np.repeat(mark_seen(ids, vocab_size), config.num_beams, axis=0)

    def advance(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes scores float32 [R, V]; returns which rows continue and their next tokens, int32 [R] each."""
        config, vocab_size = self.config, scores.shape[1]
        # Enough that `num_beams` remain whichever of them are end tokens.
        count = max(2, 1 + len(config.eos_ids)) * config.num_beams
        rows = np.arange(scores.shape[0], dtype=np.int32)
        tokens = np.full(rows.size, config.pad_token_id, np.int32)
        for index, finished in enumerate(self.finished):
            if finished.complete:
                continue
            own = slice(index * config.num_beams, (index + 1) * config.num_beams)
            seen = None if self.seen is None else self.seen[own]
            log_probs = apply_filters(self.filters, log_softmax(scores[own]), seen)
            flat = (log_probs + self.sums[index][:, None]).ravel()
            best = _largest(flat, count)
            beams, ids = own.start + best // vocab_size, best % vocab_size
            running = self._sort_out(finished, flat[best], beams, ids)
            rows[own], tokens[own], self.sums[index] = beams[running], ids[running], flat[best][running]
            finished.update_complete(float(flat[best[0]]), self.generated.shape[1] + 1)
        self.generated = np.concatenate([self.generated[rows], tokens[:, None]], axis=1)
        if self.seen is not None:
            self.seen = self.seen[rows]
            self.seen[np.arange(rows.size), tokens] = True
        self._end_at_limits()
        return rows, tokens

    def _sort_out(
        self, finished: FinishedHypotheses, sums: np.ndarray, beams: np.ndarray, ids: np.ndarray
    ) -> list[int]:
        """Stores finished candidates (best first); returns the places of the `num_beams` that continue."""
        running: list[int] = []
        for place in range(ids.size):
            if ids[place] not in self.config.eos_ids:
                running.append(place)
                if len(running) == self.config.num_beams:
                    break
            elif place < self.config.num_beams:  # an end token below the best ones is not a finish
                tokens = [*self.generated[beams[place]].tolist(), int(ids[place])]
                finished.add(tokens, float(sums[place]))
        return running

    def _end_at_limits(self) -> None:
        """Ends the prompts that have no room for another token with their running hypotheses."""
        num_beams = self.config.num_beams
        for index, finished in enumerate(self.finished):
            if not finished.complete and self.generated.shape[1] == self.limits[index]:
                for beam in range(num_beams):
                    tokens = self.generated[index * num_beams + beam].tolist()
                    finished.add(tokens, float(self.sums[index, beam]))
                finished.complete = True


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest of [N], largest first; of equal ones the lower place comes first."""
    count = min(count, values.size)
    threshold = np.partition(values, values.size - count)[values.size - count]
    places = np.flatnonzero(values >= threshold)
    return places[np.argsort(-values[places], kind="stable")[:count]]
