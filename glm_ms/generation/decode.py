"""The decoding loop: greedy and sampling step by step, and `generate` over all ways of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable, Protocol

import numpy as np

from glm_ms.generation.beam_search import beam_search
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.inputs import GenerationInputs
from glm_ms.generation.sampling import (
    apply_filters,
    build_processors,
    build_warpers,
    check_scores,
    draw,
    mark_seen,
    row_generators,
)


class Decoder(Protocol):
    """A network with a key/value cache, as the decoding loops see it. B is the same in all calls of a run."""

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray
    ) -> np.ndarray:
        """Starts a new run on int32 [B, S] each, left padded; returns float32 [B, V] of the last place."""

    def step(self, token_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Appends one token per row, int32 [B] each, to the cache; returns float32 [B, V]."""

    def reorder(self, rows: np.ndarray) -> None:
        """Makes cache row i what row rows[i] was, rows int32 [B]; called in beam search only."""


def stream(decoder: Decoder, inputs: GenerationInputs, config: GenerationConfig) -> Iterator[np.ndarray]:
    """Greedy decoding or sampling, one step at a time.

    Args:
        decoder: the network.
        inputs: B prompts.
        config: see `GenerationConfig`; with N = num_return_sequences, output row i * N + j is sequence j of
            prompt i.

    Yields:
        int32 [B * N]: the next token of each row. A row ends with the first of `config.eos_ids`, which is
        yielded, or at `max_length`; from then on it holds `pad_token_id`. At most `max_new_tokens` steps, fewer
        if all rows end.
        The network computes a step only when its token is asked for.

    Raises:
        ValueError: at the call: beam search has no tokens to show before its end. At the first step: an end
            or padding id outside the vocabulary.
        FloatingPointError: the network returned nan or inf.
    """
    check_streamable(config)
    return _stream(decoder, inputs, config)


def check_streamable(config: GenerationConfig) -> None:
    """Raises ValueError for beam search, which has no token to show before its end."""
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams = {config.num_beams}: beam search cannot be streamed, its best sequence is known at "
            "the end only; set num_beams = 1 or call generate"
        )


def generate(decoder: Decoder, inputs: GenerationInputs, config: GenerationConfig) -> list[list[int]]:
    """Generates to the end: greedy, sampling or beam search, as `config` says.

    Args:
        decoder: the network.
        inputs: B prompts.
        config: see `GenerationConfig`.

    Returns:
        B * num_return_sequences lists, those of one prompt together (beams: best first): the prompt without
        padding, then the generated ids up to and including the end token. Lists have no fill at the end.

    Raises:
        ValueError: an end or padding id outside the vocabulary.
        FloatingPointError: the network returned nan or inf.
    """
    if config.num_beams > 1:
        ranked = beam_search(decoder, inputs, config)
        return [
            prompt + hypothesis.token_ids
            for prompt, hypotheses in zip(inputs.prompts(), ranked)
            for hypothesis in hypotheses
        ]
    expanded = inputs.expand(config.num_return_sequences)
    sequences, limits = (
        expanded.prompts(),
        expanded.new_token_limits(config.max_new_tokens, config.max_length),
    )
    finished = np.zeros(len(sequences), bool)
    for step, tokens in enumerate(stream(decoder, inputs, config), 1):
        for row in np.flatnonzero(~finished):
            sequences[row].append(int(tokens[row]))
        finished |= np.isin(tokens, config.eos_ids) | (step == limits)
    return sequences


def _stream(decoder: Decoder, inputs: GenerationInputs, config: GenerationConfig) -> Iterator[np.ndarray]:
    choose = _chooser(inputs, config)
    inputs = inputs.expand(config.num_return_sequences)
    scores = decoder.prefill(inputs.input_ids, inputs.attention_mask, inputs.position_ids)
    config.check_vocab_size(scores.shape[1])
    processors = build_processors(config)
    seen = None
    if config.repetition_penalty != 1:
        seen = mark_seen(inputs.input_ids, scores.shape[1], inputs.attention_mask)
    next_position = inputs.position_ids[:, -1] + 1
    limits = inputs.new_token_limits(config.max_new_tokens, config.max_length)
    finished = np.zeros(inputs.batch_size, bool)
    for step in range(limits.max()):
        if not config.replace_invalid_scores:
            check_scores(scores, step)
        tokens = choose(apply_filters(processors, scores, seen))
        tokens = np.where(finished, config.pad_token_id, tokens).astype(np.int32)
        finished |= np.isin(tokens, config.eos_ids) | (step + 1 == limits)
        if seen is not None:
            seen[np.arange(tokens.size), tokens] = True
        yield tokens
        if finished.all():
            return
        # A row that has ended stays where it is: its positions must not run out of the table.
        scores = decoder.step(tokens, next_position + np.minimum(step, limits - 1))


def _chooser(inputs: GenerationInputs, config: GenerationConfig) -> Callable[[np.ndarray], np.ndarray]:
    """From processed scores float32 [B * N, V] to tokens [B * N]."""
    if not config.do_sample:
        return lambda scores: scores.argmax(axis=1)
    warpers = build_warpers(config)
    generators = row_generators(inputs.prompts(), config.num_return_sequences, config.seed)
    return lambda scores: draw(apply_filters(warpers, scores), generators)
