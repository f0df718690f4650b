"""`--run_mode predict`: answers to prompts from the command line, a file or standard input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm_ms.data.prompts import read_prompts
from glm_ms.engine.answers import answers_in_order
from glm_ms.engine.from_settings import generation_options
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import Ranks, check_equal_on_ranks, ranks_of
from glm_ms.engine.results import ResultLines, result_folder
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.storage.errors import DataError
from glm_ms.storage.run_folder import ANSWERS_FILE
from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer


class Prediction(NamedTuple):
    """A prompt and its answers (several with `num_return_sequences`)."""

    prompt: str
    answers: list[str]


def predict(
    settings: Settings, model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, show: Say, say: Say
) -> list[Prediction]:
    """Answers every prompt and writes `predict_results.jsonl` into the output folder, each answer before it is shown.

    With `resume` the answers that are there stay.

    The template of the tokenizer makes a chat prompt of a plain text; text in the template stays as it is. A single
    prompt without beams is shown while it is generated. The ranks of a parallel run take parts of the prompts in turn,
    with the answers of a single process; the first rank shows and writes.

    `show` takes pieces of text for the user, line breaks included, `say` notes. Returns all predictions in order, on
    every rank.

    Raises:
        DataError: prompts that cannot be read or are too long.
        CheckpointError: the answers in the output folder are of another job.
        WriteError: an answer cannot be written.
        RankError: the ranks have different prompts or weights, or one has failed.
    """
    ranks = ranks_of(settings)
    check_equal_on_ranks(model.network.get_parameters(), ranks)
    options = generation_options(settings, tokenizer, say)
    texts, prompts, digest = _prompts(settings, tokenizer, ranks, say)
    check_prompt_lengths(prompts, options, model.config.seq_length)
    size = settings.predict_batch_size
    streamed = len(texts) == 1 and options["num_beams"] == 1 and options["num_return_sequences"] == 1
    display = _Display(show)

    def answers(start: int) -> Iterator[list[str]]:
        if streamed:
            prompt = prompts[start:]  # none, if its answer is there
            yield from ranks.share_out(prompt, lambda ids: [_stream(model, tokenizer, ids, options, display.show)])
        else:
            for found in answers_in_order(model, prompts, options, size, ranks, start):
                yield [answer_text(tokenizer, ids) for ids in found]

    path = Path(settings.output_dir) / ANSWERS_FILE
    made_of = {"number of prompts": len(texts), "prompts": digest}
    with (
        result_folder(settings, made_of, ranks, say),
        ResultLines(path, {"answers": list}, ranks) as lines,
    ):
        results = [Prediction(text, line["answers"]) for text, line in zip(texts, lines.stored)]
        if results:
            say(f"{path}: {len(results)} of {len(texts)} answers are there")
        for text, found in zip(texts[len(results) :], answers(len(results))):
            results.append(Prediction(text, found))
            lines.append(results[-1]._asdict())
            if not streamed and ranks.first:
                display.show("".join(f"{text}\n -> {one}\n" for one in found))
            display.check()
    return results


def _prompts(
    settings: Settings, tokenizer: SentencePieceTokenizer, ranks: Ranks, say: Say
) -> tuple[list[str], list[list[int]], str]:
    """Text and ids of every prompt, and the SHA-256 of all ids, which is the same on all ranks."""
    read = read_prompts(settings.predict_data, say)
    prompts = [prompt.ids(tokenizer) for prompt in read]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    ranks.agree("predict_data", {"number of prompts": len(read), "SHA-256 of the prompts": digest})
    return [prompt.text for prompt in read], prompts, digest


class _Display:
    """Where answers are shown. If it fails, such as a pipe that is closed, the answer being made is still written."""

    def __init__(self, show: Say) -> None:
        self._show = show
        self._error: OSError | None = None

    def show(self, text: str) -> None:
        """Shows a text, unless an earlier one could not be shown."""
        try:
            if self._error is None:
                self._show(text)
        except OSError as error:
            self._error = error

    def check(self) -> None:
        """Raises the OSError of a text that could not be shown."""
        if self._error is not None:
            raise self._error


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
