"""`--run_mode predict`: answers to prompts from the command line, a file or standard input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm_ms.data.prompts import read_prompts
from glm_ms.engine.from_settings import generation_options
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import check_equal_on_ranks, ranks_of
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer

RESULTS_FILE = "predict_results.jsonl"


class Prediction(NamedTuple):
    """A prompt and its answers (several with `num_return_sequences`)."""

    prompt: str
    answers: list[str]


def predict(
    settings: Settings, model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, show: Say, say: Say
) -> list[Prediction]:
    """Answers every prompt and writes `predict_results.jsonl` into the output folder.

    The template of the tokenizer makes a chat prompt of a plain text; text in the template stays as it is. A single
    prompt without beams is shown while it is generated. The ranks of a parallel run take the batches in turn, with the
    batches and answers of a single process; the first rank shows and writes.

    `show` takes pieces of text for the user, line breaks included, `say` notes. Returns all predictions in order, on
    every rank.

    Raises:
        DataError: prompts that cannot be read or are too long.
        RankError: the ranks have different prompts or weights, or one has failed.
    """
    ranks = ranks_of(settings)
    check_equal_on_ranks(model.network.get_parameters(), ranks)
    options = generation_options(settings, tokenizer, say)
    read = read_prompts(settings.predict_data, say)
    texts, prompts = [prompt.text for prompt in read], [prompt.ids(tokenizer) for prompt in read]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    ranks.agree("predict_data", {"number of prompts": len(texts), "SHA-256 of the prompts": digest})
    check_prompt_lengths(prompts, options, model.config.seq_length)
    size = settings.predict_batch_size
    streamed = len(texts) == 1 and options["num_beams"] == 1 and options["num_return_sequences"] == 1

    def answer(start: int) -> list[list[str]]:
        if streamed:
            return [[_stream(model, tokenizer, prompts[0], options, show)]]
        batch, count = prompts[start : start + size], options["num_return_sequences"]
        sequences = model.generate(batch, **options)
        found = [answer_text(tokenizer, ids[len(batch[i // count]) :]) for i, ids in enumerate(sequences)]
        return [found[i : i + count] for i in range(0, len(found), count)]

    results = []
    starts = range(0, len(texts), size)
    for start, answers in zip(starts, ranks.share_out(starts, answer)):
        for text, found in zip(texts[start : start + size], answers):
            results.append(Prediction(text, found))
            if not streamed and ranks.first:
                show("".join(f"{text}\n -> {one}\n" for one in found))
    if ranks.first:
        lines = (json.dumps(result._asdict(), ensure_ascii=False) + "\n" for result in results)
        replace_text(Path(settings.output_dir) / RESULTS_FILE, "".join(lines))
    return results


def check_prompt_lengths(prompts: Sequence[Sequence[int]], options: Mapping[str, Any], seq_length: int) -> None:
    """Checks all prompts before the first answer: one that is too long must not cost the answers to the others.

    Raises DataError.
    """
    longest, max_new_tokens = options["max_length"], options["max_new_tokens"]
    for number, prompt in enumerate(prompts, 1):
        if longest is not None and len(prompt) >= longest:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, which leaves no room for an answer within "
                f"generation.max_length = {longest}; shorten it, or raise generation.max_length"
            )
        if len(prompt) + max_new_tokens > seq_length and (longest is None or longest > seq_length):
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens; with generation.max_new_tokens = {max_new_tokens} that "
                f"exceeds model.model_config.seq_length = {seq_length}; shorten it, lower the one or raise the other"
            )


def _known_ids(tokenizer: SentencePieceTokenizer, ids: Sequence[int] | np.ndarray) -> list[int]:
    """Ids that the tokenizer has. The network may have more: an untrained one generates such padding ids too."""
    return [int(token) for token in ids if token < tokenizer.vocab_size]


def answer_text(tokenizer: SentencePieceTokenizer, ids: Sequence[int], stop_ids: Sequence[int] | None = None) -> str:
    """Generated ids as text, without the stop id at the end and surrounding white space.

    `stop_ids` are those that ended generation; None: those of the tokenizer.
    """
    ids = _known_ids(tokenizer, ids)
    if ids and ids[-1] in (tokenizer.stop_token_ids if stop_ids is None else stop_ids):
        ids.pop()
    return tokenizer.decode(ids).strip()


def _stream(
    model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, prompt: list[int], options: dict, show: Say
) -> str:
    decoder = IncrementalDecoder(tokenizer)
    text = ""
    for tokens in model.stream(prompt, **options):
        if int(tokens[0]) in options["eos_token_id"]:
            break
        piece = "".join(decoder.push(token) for token in _known_ids(tokenizer, tokens))
        if not text:
            piece = piece.lstrip()
        text += piece
        show(piece)
    last = decoder.flush()
    show(last + "\n")
    return (text + last).strip()
