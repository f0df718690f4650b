"""Beam search with the rules of transformers 4.41.2.

Scores are sums of log probabilities (float32, as there) over generated tokens, the end token included;
hypotheses are ranked by sum / generated length ** length_penalty, the prompt not counted. One detail
differs on purpose: with several end ids a finished sequence ends with the id that was generated, where
transformers 4.41.2 always writes the first of the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.inputs import GenerationInputs
from glm_ms.generation.sampling import (
    ScoreFilter,
    apply_filters,
    build_processors,
    check_scores,
    log_softmax,
    mark_seen,
)

if TYPE_CHECKING:
    from glm_ms.generation.decode import Decoder

# Sum of the copies of a prompt in its first step, when only one of the equal beams may go on.
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
        """Takes a hypothesis in; above `num_beams` the worst one leaves."""
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
        """The `count` best, best first; of equal ones the later found comes first."""
        return sorted(self.hypotheses, key=lambda one: one.score)[::-1][:count]


def beam_search(
    decoder: Decoder, inputs: GenerationInputs, config: GenerationConfig
) -> list[list[BeamHypothesis]]:
    """Searches the best continuations of each prompt; prompts do not influence each other.

    Args:
        decoder: the network; it sees B * num_beams rows, the beams of a prompt together.
        inputs: B prompts.
        config: `num_beams`, `num_return_sequences`, `length_penalty`, `early_stopping`, `max_new_tokens`,
            `max_length`, `eos_token_id`, `repetition_penalty` (on log probabilities, as transformers does here).

    Returns:
        For each prompt `num_return_sequences` hypotheses, best first.

    Raises:
        ValueError: an end or padding id outside the vocabulary, or nothing but end ids in it.
        FloatingPointError: the network returned nan or inf.
    """
    search = _Search(inputs, config)
    expanded = inputs.expand(config.num_beams)
    scores = decoder.prefill(expanded.input_ids, expanded.attention_mask, expanded.position_ids)
    search.start(expanded, scores.shape[1])
    next_position = expanded.position_ids[:, -1] + 1
    last_steps = np.repeat(search.limits, config.num_beams) - 1
    for step in range(search.limits.max()):
        if not config.replace_invalid_scores:
            check_scores(scores, step)
        rows, tokens = search.advance(scores)
        if search.is_complete():
            break
        if (rows != np.arange(rows.size)).any():
            decoder.reorder(rows)
        scores = decoder.step(tokens, next_position + np.minimum(step, last_steps))
    return search.results()


class _Search:
    """State of a running search: R = B * num_beams rows."""

    def __init__(self, inputs: GenerationInputs, config: GenerationConfig) -> None:
        rows = inputs.batch_size * config.num_beams
        self.config = config
        self.finished = [FinishedHypotheses(config) for _ in range(inputs.batch_size)]
        self.limits = inputs.new_token_limits(config.max_new_tokens, config.max_length)
        self.generated = np.empty((rows, 0), np.int32)
        self.sums = np.full((inputs.batch_size, config.num_beams), _NOT_STARTED, np.float32)
        self.sums[:, 0] = 0
        self.filters: list[ScoreFilter] = build_processors(config)
        self.seen: np.ndarray | None = None

    def start(self, expanded: GenerationInputs, vocab_size: int) -> None:
        """Checks the vocabulary and notes the prompts for the repetition penalty."""
        self.config.check_vocab_size(vocab_size)
        if len(self.config.eos_ids) >= vocab_size:
            raise ValueError(f"eos_token_id: all {vocab_size} ids of the vocabulary end a sequence")
        if self.config.repetition_penalty != 1:
            self.seen = mark_seen(expanded.input_ids, vocab_size, expanded.attention_mask)

    def advance(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes scores float32 [R, V]; returns the rows that go on and their next tokens, int32 [R] each."""
        config, vocab_size = self.config, scores.shape[1]
        totals = apply_filters(self.filters, log_softmax(scores), self.seen) + self.sums.reshape(-1, 1)
        # So many that `num_beams` remain whichever of them are end tokens.
        count = max(2, 1 + len(config.eos_ids)) * config.num_beams
        rows = np.arange(totals.shape[0], dtype=np.int32)
        tokens = np.full(rows.size, config.pad_token_id, np.int32)
        for index, finished in enumerate(self.finished):
            if finished.complete:
                continue
            own = slice(index * config.num_beams, (index + 1) * config.num_beams)
            flat = totals[own].ravel()
            best = _largest(flat, count)
            beams, ids = own.start + best // vocab_size, best % vocab_size
            going_on = self._sort_out(finished, flat[best], beams, ids)
            rows[own], tokens[own], self.sums[index] = beams[going_on], ids[going_on], flat[best][going_on]
            finished.update_complete(float(flat[best[0]]), self.generated.shape[1] + 1)
        self.generated = np.concatenate([self.generated[rows], tokens[:, None]], axis=1)
        if self.seen is not None:
            self.seen = self.seen[rows]
            self.seen[np.arange(rows.size), tokens] = True
        self._end_where_length_ran_out()
        return rows, tokens

    def _sort_out(
        self, finished: FinishedHypotheses, sums: np.ndarray, beams: np.ndarray, ids: np.ndarray
    ) -> list[int]:
        """Puts finished candidates (best first) aside; returns the places of the `num_beams` that go on."""
        going_on: list[int] = []
        for place in range(ids.size):
            if ids[place] not in self.config.eos_ids:
                going_on.append(place)
                if len(going_on) == self.config.num_beams:
                    break
            elif place < self.config.num_beams:  # an end token below the best ones is not a finish
                tokens = [*self.generated[beams[place]].tolist(), int(ids[place])]
                finished.add(tokens, float(sums[place]))
        return going_on

    def _end_where_length_ran_out(self) -> None:
        """Takes the running hypotheses of prompts that have no room for another token as they are."""
        num_beams = self.config.num_beams
        for index, finished in enumerate(self.finished):
            if not finished.complete and self.generated.shape[1] == self.limits[index]:
                for beam in range(num_beams):
                    tokens = self.generated[index * num_beams + beam].tolist()
                    finished.add(tokens, float(self.sums[index, beam]))
                finished.complete = True

    def is_complete(self) -> bool:
        """Whether no prompt goes on."""
        return all(finished.complete for finished in self.finished)

    def results(self) -> list[list[BeamHypothesis]]:
        """The best of finished and, where the length ran out, running hypotheses of each prompt."""
        return [finished.best(self.config.num_return_sequences) for finished in self.finished]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest of [N], largest first; of equal ones the lower place comes first."""
    count = min(count, values.size)
    threshold = np.partition(values, values.size - count)[values.size - count]
    places = np.flatnonzero(values >= threshold)
    return places[np.argsort(-values[places], kind="stable")[:count]]
