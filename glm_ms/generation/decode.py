"""The decoding loop: greedy and sampling step by step, and `generate` over all ways of decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from glm_ms.generation.beam_search import beam_search
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decoder import Decoder
from glm_ms.generation.inputs import Prompt, new_token_limits
from glm_ms.generation.sampling import row_samplers


def stream(decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]) -> Iterator[np.ndarray]:
    """Greedy decoding or sampling, one step at a time. Each row gets what it gets alone.

    Args:
        configs: one for each prompt, which has `num_return_sequences` output rows, those of a prompt together.

    Yields:
        int32 [rows]: the next token of each row. A row ends with the first of its `eos_ids`, which is yielded, or at
        its `max_new_tokens` or `max_length`; from then on it has its `pad_token_id`. The stream ends with the last
        row. The network computes a step only when its token is asked for.

    Raises:
        ValueError: beam search, or an end or padding id outside the vocabulary.
        FloatingPointError: the network returned nan or inf.
    """
    for config in configs:
        check_streamable(config)
    pads = np.array([c.pad_token_id for c in configs for _ in range(c.num_return_sequences)], np.int32)
    for rows, tokens in _decode(decoder, prompts, configs):
        step = pads.copy()
        step[rows] = tokens
        yield step


def check_streamable(config: GenerationConfig) -> None:
    """Raises ValueError for beam search, which has no token to show before its end."""
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams = {config.num_beams}: beam search cannot be streamed, its best sequence is known at "
            "the end only; set num_beams = 1 or call generate"
        )


def generate(decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]) -> list[list[int]]:
    """Generates to the end: greedy, sampling or beam search.

    With beam search the config is the same for all prompts.

    Returns:
        `num_return_sequences` lists for each prompt, those of one prompt together (beams: best first): the prompt,
        then the generated ids up to and including the end token.

    Raises:
        ValueError: an end or padding id outside the vocabulary, or beam search with different configs.
        FloatingPointError: the network returned nan or inf.
    """
    if any(config.num_beams > 1 for config in configs):
        if any(config != configs[0] for config in configs):
            raise ValueError("num_beams: beam search takes the same config for all prompts")
        ranked = beam_search(decoder, prompts, configs[0])
        return [p.ids.tolist() + one.token_ids for p, found in zip(prompts, ranked) for one in found]
    sequences = [p.ids.tolist() for p, c in zip(prompts, configs) for _ in range(c.num_return_sequences)]
    for rows, tokens in _decode(decoder, prompts, configs):
        for row, token in zip(rows, tokens.tolist()):
            sequences[row].append(token)
    return sequences


def _decode(
    decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields at each step the output rows that have not ended before it, and their tokens, int32 each."""
    copies = [config.num_return_sequences for config in configs]
    limits = np.repeat(new_token_limits(prompts, configs), copies)
    used, scores = decoder.add(prompts)
    try:
        samplers = row_samplers([prompt.ids for prompt in prompts], configs, scores.shape[1])
        slots = np.repeat(used, copies)
        # The first row of each prompt has the slot that has run it; the others get copies.
        others = np.delete(np.arange(limits.size), np.cumsum(copies) - copies)
        if others.size:
            slots[others] = decoder.fork(slots[others].tolist())
            used = slots.tolist()
            scores = np.repeat(scores, copies, axis=0)
        rows = np.arange(limits.size)
        for step in range(limits.max()):
            tokens = np.array([samplers[row](one) for row, one in zip(rows, scores)], np.int32)
            met = [token in samplers[row].config.eos_ids for row, token in zip(rows, tokens.tolist())]
            ended = np.array(met) | (step + 1 == limits[rows])
            yield rows, tokens
            if ended.any():
                decoder.free(slots[rows[ended]].tolist())
                rows, tokens = rows[~ended], tokens[~ended]
                used = slots[rows].tolist()
            if not rows.size:
                return
            scores = decoder.step(used, tokens)
    finally:
        decoder.free(used)
