"""The decoding loops over a decoder: `stream` step by step, `generate` and `answers` to the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np

from glm_ms.generation.batch import Batch
from glm_ms.generation.beam_search import BeamSearch
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decoder import Decoder
from glm_ms.generation.inputs import Prompt, new_token_limits
from glm_ms.generation.output_rows import OutputRows, SampledRows
from glm_ms.generation.sampling import copy_numbers


def stream(decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]) -> Iterator[np.ndarray]:
    """Greedy decoding or sampling, one step at a time. Each row gets what it gets alone.

    Args:
        decoder: with a slot for each row.
        configs: one for each prompt, which has `num_return_sequences` output rows, those of a prompt together.

    Yields:
        int32 [rows]: the next token of each row. A row ends with the first of its `eos_ids`, which is yielded, or at
        its `max_new_tokens` or `max_length`; from then on it has its `pad_token_id`. The stream ends with the last
        row. The network computes a step only when a row needs its token.

    Raises:
        ValueError: beam search, or an end or padding id outside the vocabulary.
        FloatingPointError: the network returned nan or inf.
    """
    for config in configs:
        check_streamable(config)
    every = list(_output_rows(decoder, prompts, configs))
    pads = np.array([c.pad_token_id for c in configs for _ in range(c.num_return_sequences)], np.int32)
    with closing(Batch(decoder)) as batch:
        batch.join(every)
        step = 0
        while True:
            sequences = [sequence for one in every for sequence in one.results()]
            tokens = pads.copy()
            for row, sequence in enumerate(sequences):
                if len(sequence) > step:
                    tokens[row] = sequence[step]
            yield tokens
            step += 1
            while batch.running and batch.shortest <= step:
                batch.step()
            if not any(len(sequence) > step for one in every for sequence in one.results()):
                return


def check_streamable(config: GenerationConfig) -> None:
    """Raises ValueError for beam search, which has no token to show before its end."""
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams = {config.num_beams}: beam search cannot be streamed, its best sequence is known at "
            "the end only; set num_beams = 1 or call generate"
        )


def generate(decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig]) -> list[list[int]]:
    """Generates to the end: greedy, sampling or beam search, as the config of each prompt says.

    Returns:
        `num_return_sequences` lists for each prompt, those of one prompt together (beams: best first): the prompt,
        then the generated ids up to and including the end token.

    Raises as `answers`.
    """
    found = dict(answers(decoder, prompts, configs))
    return [prompt.ids.tolist() + ids for number, prompt in enumerate(prompts) for ids in found[number]]


def answers(
    decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig],
    copies: Sequence[int] | None = None
) -> Iterator[tuple[int, list[list[int]]]]:  # fmt: skip
    """As `generate`, but each prompt as soon as it has ended: they join in order, when others leave the slots.

    Args:
        decoder: with enough slots for each prompt alone.
        copies: for the random stream of each prompt, see `copy_numbers`; None: counted among these prompts.

    Yields:
        The number of a prompt, and its generated ids, `num_return_sequences` lists.

    Raises:
        ValueError: an end or padding id outside the vocabulary, or a prompt that needs more slots than there are.
        FloatingPointError: the network returned nan or inf.
    """
    for one in run(decoder, _output_rows(decoder, prompts, configs, copies)):
        yield one.number, one.results()


def run(decoder: Decoder, rows: Iterable[OutputRows]) -> Iterator[OutputRows]:
    """Decodes the rows of prompts, which join in order as soon as there are slots for them; yields them as they end."""
    rows = iter(rows)
    following = next(rows, None)
    with closing(Batch(decoder)) as batch:
        while following is not None or batch.running:
            joining, room = list[OutputRows](), batch.room
            while following is not None and following.width <= room:
                room -= following.width
                joining.append(following)
                following = next(rows, None)
            if following is not None and not joining and not batch.running:
                raise ValueError(
                    f"a prompt needs {following.width} slots for its beams or sequences, the decoder has {room}"
                )
            yield from batch.join(joining) if joining else batch.step()


def _output_rows(
    decoder: Decoder, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig],
    copies: Sequence[int] | None = None
) -> Iterator[OutputRows]:  # fmt: skip
    """The rows of each prompt, made when they are asked for: they may need much memory."""
    limits, vocab_size, first_row = new_token_limits(prompts, configs).tolist(), decoder.vocab_size, 0
    for config in {id(config): config for config in configs}.values():
        config.check_vocab_size(vocab_size)
    if copies is None:
        copies = copy_numbers([prompt.ids for prompt in prompts], configs)
    for number, (prompt, config, limit, copy) in enumerate(zip(prompts, configs, limits, copies)):
        if config.num_beams > 1:
            yield BeamSearch(prompt, config, number, limit, vocab_size, first_row)
            first_row += config.num_beams
        else:
            yield SampledRows(prompt, config, number, limit, vocab_size, copy, first_row)
            first_row += config.num_return_sequences
