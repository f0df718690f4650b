"""Beam search with the rules of transformers 4.41.2.

Scores are sums of log probabilities (float32, as there) over generated tokens, the end token included; hypotheses are
ranked by sum / generated length ** length_penalty, the prompt not counted. One detail differs on purpose: with several
end ids a finished sequence ends with the id that was generated; transformers always writes the first of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decoder import Decoder
from glm_ms.generation.inputs import Prompt, new_token_limits
from glm_ms.generation.sampling import History, apply_filters, build_filters, check_scores, largest, log_softmax

# Sum of the copies of a prompt in its first step, when only one of the equal beams may continue.
_NOT_STARTED = np.float32(-1e9)


@dataclass(frozen=True)
class BeamHypothesis:
    """One result of beam search."""

    token_ids: list[int]  # generated, the end token included, the prompt not
    sum_log_probs: float  # of these ids, after bias and penalties, if any
    score: float  # sum_log_probs / len(token_ids) ** length_penalty


def beam_search(decoder: Decoder, prompts: Sequence[Prompt], config: GenerationConfig) -> list[list[BeamHypothesis]]:
    """Searches the best continuations of each prompt; prompts do not influence each other.

    Args:
        decoder: the network; it needs `num_beams` free slots for each prompt.
        prompts: any number.
        config: sampling options have no effect; penalties and bias act on log probabilities, as transformers does
            here.

    Returns:
        For each prompt `num_return_sequences` hypotheses, best first.

    Raises:
        ValueError: an end or padding id outside the vocabulary, or nothing but end ids in it.
        FloatingPointError: the network returned nan or inf.
    """
    beams = config.num_beams
    used, scores = decoder.add(prompts)
    try:
        vocab_size = scores.shape[1]
        config.check_vocab_size(vocab_size)
        if len(config.eos_ids) >= vocab_size:
            raise ValueError(f"eos_token_id: all {vocab_size} ids of the vocabulary end a sequence")
        limits = new_token_limits(prompts, [config] * len(prompts))
        searches = [_Search(config, prompt, limit, vocab_size) for prompt, limit in zip(prompts, limits)]
        # R = B * num_beams rows, those of a prompt together.
        scores, slots = np.repeat(scores, beams, axis=0), np.repeat(used, beams)
        for step in range(limits.max()):
            if not config.replace_invalid_scores:
                check_scores(scores, step)
            for search, own in zip(searches, np.split(scores, len(searches))):
                if not search.complete:
                    search.advance(own)
            alive = np.repeat([not search.complete for search in searches], beams)
            if not alive.any():
                break
            tokens = np.concatenate([search.tokens for search in searches])
            rows = np.concatenate([index * beams + search.beams for index, search in enumerate(searches)])
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
    # Best first; of equal ones the one found later comes first.
    ranked = (sorted(search.finished, key=lambda one: one.score)[::-1] for search in searches)
    return [hypotheses[: config.num_return_sequences] for hypotheses in ranked]


class _Search:
    """State of the search for one prompt."""

    beams: np.ndarray  # int [num_beams], the running hypotheses that continue
    tokens: np.ndarray  # int32 [num_beams], their next tokens

    def __init__(self, config: GenerationConfig, prompt: Prompt, limit: int, vocab_size: int) -> None:
        self.config, self.limit = config, limit
        self.finished: list[BeamHypothesis] = []  # the best ones, at most num_beams
        self.complete = False
        self.generated = np.empty((config.num_beams, 0), np.int32)  # [num_beams, steps]
        self.sums = np.full(config.num_beams, _NOT_STARTED, np.float32)  # of log probabilities
        self.sums[0] = 0
        self.filters = build_filters(config)
        self.history = History(config, [prompt.ids] * config.num_beams, vocab_size)

    def advance(self, scores: np.ndarray) -> None:
        """Takes a step with scores float32 [num_beams, V]."""
        config = self.config
        log_probs = apply_filters(self.filters, log_softmax(scores), self.history)
        sums = (log_probs + self.sums[:, None]).ravel()
        # Enough that `num_beams` remain whichever of them are end tokens.
        best = largest(sums, max(2, 1 + len(config.eos_ids)) * config.num_beams)
        sums, (beams, ids) = sums[best], np.divmod(best, scores.shape[1])
        running = []
        for place in range(ids.size):
            if ids[place] not in config.eos_ids:
                running.append(place)
                if len(running) == config.num_beams:
                    break
            elif place < config.num_beams:  # an end token below the best ones is not a finish
                self._finish([*self.generated[beams[place]].tolist(), int(ids[place])], float(sums[place]))
        self.beams, self.tokens, self.sums = beams[running], ids[running].astype(np.int32), sums[running]
        self.generated = np.concatenate([self.generated[self.beams], self.tokens[:, None]], axis=1)
        self.history.append(self.tokens, self.beams)
        length = self.generated.shape[1]
        if len(self.finished) == config.num_beams:
            attainable = float(sums[0]) / length**config.length_penalty
            self.complete = config.early_stopping or min(one.score for one in self.finished) >= attainable
        if not self.complete and length == self.limit:
            for tokens, total in zip(self.generated.tolist(), self.sums.tolist()):
                self._finish(tokens, total)
            self.complete = True

    def _finish(self, token_ids: list[int], sum_log_probs: float) -> None:
        """Adds a hypothesis; of more than `num_beams` the worst one is dropped."""
        score = sum_log_probs / len(token_ids) ** self.config.length_penalty
        if len(self.finished) == self.config.num_beams:
            worst = min(self.finished, key=lambda one: one.score)
            if score <= worst.score:
                return
            self.finished.remove(worst)
        self.finished.append(BeamHypothesis(token_ids, sum_log_probs, score))
