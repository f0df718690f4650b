"""`--run_mode predict`: answers to prompts from the command line, a file or standard input."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm_ms.engine.from_settings import generation_options
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import check_equal_on_ranks, ranks_of
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import DataError
from glm_ms.storage.readers import decode_text, parse_json, read_text
from glm_ms.tokenizer import IncrementalDecoder, SentencePieceTokenizer

RESULTS_FILE = "predict_results.jsonl"
_PROMPT_KEYS = ("prompt", "content", "query", "text")


class Prediction(NamedTuple):
    """A prompt and its answers (several with `num_return_sequences`)."""

    prompt: str
    answers: list[str]


def read_prompts(predict_data: str) -> list[str]:
    """Prompts of `--predict_data`.

    It is `-` for standard input (a prompt a line), a path ending in .txt (a prompt a line) or .jsonl (an object a line
    with `prompt`, `content`, `query` or `text`, or a string a line), else the prompt itself. Raises DataError, with
    file and line, if a file is missing, empty or broken.
    """
    suffix = Path(predict_data).suffix.lower() if "\n" not in predict_data else ""
    source, prompts = predict_data, [predict_data]
    if predict_data == "-":
        source = "standard input"
        text = decode_text(sys.stdin.buffer.read(), source, DataError)
        prompts = [line.rstrip("\r") for line in text.split("\n")]
    elif suffix in (".txt", ".jsonl"):
        missing = f"no such file; give an existing {suffix} file, or a prompt"
        prompts = read_text(Path(predict_data), DataError, missing).split("\n")
        if suffix == ".jsonl":
            prompts = [_prompt_of(line, source, i) for i, line in enumerate(prompts, 1) if line.strip()]
    elif _is_path(predict_data):
        raise DataError(f"{source}: prompts are read from .txt and .jsonl files only")
    else:
        source = "predict_data"
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise DataError(f"{source}: no prompt; give a text, a .txt or .jsonl file, or - for standard input")
    return prompts


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
    texts = read_prompts(settings.predict_data)
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    ranks.agree("predict_data", {"number of prompts": len(texts), "SHA-256 of the prompts": digest})
    prompts = [_prompt_ids(tokenizer, text) for text in texts]
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


def _prompt_ids(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    if tokenizer.is_template(text.lstrip()):
        return tokenizer.encode_template(text.lstrip())
    return tokenizer.build_chat_input(text)["input_ids"]


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


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def _prompt_of(line: str, source: str, number: int) -> str:
    value = parse_json(line, source, DataError, number)
    if isinstance(value, dict):
        value = next((value[key] for key in _PROMPT_KEYS if key in value), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{source}:{number}: expected a text that is not empty, or an object with one as {', '.join(_PROMPT_KEYS)}"
        )
    return value
