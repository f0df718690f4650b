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
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.output_rows import After, Chosen, OutputRows, unknown
from glm_ms.generation.sampling import History, apply_filters, build_filters, check_scores, largest, log_softmax

# Sum of the copies of a prompt in its first step, when only one of the equal beams may continue.
_NOT_STARTED = np.float32(-1e9)


@dataclass(frozen=True)
class BeamHypothesis:
    """One result of beam search."""

    token_ids: list[int]  # generated, the end token included, the prompt not
    sum_log_probs: float  # of these ids, after bias and penalties, if any
    score: float  # sum_log_probs / len(token_ids) ** length_penalty


class BeamSearch(OutputRows):
    """The search for the best continuations of a prompt; other prompts have no influence.

    Sampling options of the config have no effect; `repetition_penalty` acts on log probabilities, as transformers does
    here.

    Args:
        first_row: number of the first beam, for errors.

    Raises:
        ValueError: nothing but end ids in the vocabulary.
    """

    def __init__(
        self, prompt: Prompt, config: GenerationConfig, number: int, limit: int, vocab_size: int, first_row: int
    ) -> None:
        super().__init__(prompt, config, number, limit)
        if len(config.eos_ids) >= vocab_size:
            raise ValueError(f"eos_token_id: all {vocab_size} ids of the vocabulary end a sequence")
        self.width, self.first_row = config.num_beams, first_row
        self.finished: list[BeamHypothesis] = []  # the best ones, at most num_beams
        self.complete = False
        self.generated = np.empty((config.num_beams, 0), np.int32)  # [num_beams, steps]
        self.sums = np.full(config.num_beams, _NOT_STARTED, np.float32)  # of log probabilities
        self.sums[0] = 0
        self.filters = build_filters(config)
        self.history = History(config, [prompt.ids] * config.num_beams, vocab_size)

    def hypotheses(self) -> list[BeamHypothesis]:
        """`num_return_sequences` results, best first; of equal ones the one found later comes first."""
        ranked = sorted(self.finished, key=lambda one: one.score)[::-1]
        return ranked[: self.config.num_return_sequences]

    def lengths(self) -> list[int]:
        return [] if self.complete else [self.generated.shape[1]] * self.config.num_beams

    def results(self) -> list[list[int]]:
        return [one.token_ids for one in self.hypotheses()]

    def advance(self, scores: Sequence[np.ndarray], after: After = unknown) -> Chosen:
        config, first = self.config, len(scores) == 1
        rows = np.repeat(scores, config.num_beams, axis=0) if first else np.stack(scores)
        if not config.replace_invalid_scores:
            check_scores(rows, self.generated.shape[1], self.first_row)
        log_probs = apply_filters(self.filters, log_softmax(rows), self.history)
        sums = (log_probs + self.sums[:, None]).ravel()
        # Enough that `num_beams` remain whichever of them are end tokens.
        best = largest(sums, max(2, 1 + len(config.eos_ids)) * config.num_beams)
        sums, (beams, ids) = sums[best], np.divmod(best, rows.shape[1])
        running = []
        for place in range(ids.size):
            if ids[place] not in config.eos_ids:
                running.append(place)
                if len(running) == config.num_beams:
                    break
            elif place < config.num_beams:  # an end token below the best ones is not a finish
                self._finish([*self.generated[beams[place]].tolist(), int(ids[place])], float(sums[place]))
        beams, tokens, self.sums = beams[running], ids[running].astype(np.int32), sums[running]
        self.generated = np.concatenate([self.generated[beams], tokens[:, None]], axis=1)
        self.history.append(tokens, beams)
        length = self.generated.shape[1]
        if len(self.finished) == config.num_beams:
            attainable = float(sums[0]) / length**config.length_penalty
            self.complete = config.early_stopping or min(one.score for one in self.finished) >= attainable
        if not self.complete and length == self.limit:
            for found, total in zip(self.generated.tolist(), self.sums.tolist()):
                self._finish(found, total)
            self.complete = True
        if self.complete:
            self.width = 0
            return tokens[:0], []
        return tokens, [0] * len(tokens) if first else beams.tolist()

    def _finish(self, token_ids: list[int], sum_log_probs: float) -> None:
        """Adds a hypothesis; of more than `num_beams` the worst one is dropped."""
        score = sum_log_probs / len(token_ids) ** self.config.length_penalty
        if len(self.finished) == self.config.num_beams:
            worst = min(self.finished, key=lambda one: one.score)
            if score <= worst.score:
                return
            self.finished.remove(worst)
        self.finished.append(BeamHypothesis(token_ids, sum_log_probs, score))
