"""Generation settings as arguments of `GLMForCausalLM.generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm_ms.settings import Settings
from glm_ms.settings.schema import GenerationSettings
from glm_ms.storage.errors import DataError
from glm_ms.tokenizer import SentencePieceTokenizer


def generation_options(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Keyword arguments of `generate`.

    An answer ends at the tokenizer's stop ids. Options without effect are left out with a line to the user: a YAML
    may have `top_p` beside `do_sample: False`.
    """
    options = dataclasses.asdict(settings.generation)
    idle: list[tuple[str, tuple[str, ...]]] = []
    idle += [] if options["do_sample"] else [("do_sample: True", ("temperature", "top_k", "top_p"))]
    idle += [] if options["num_beams"] > 1 else [("num_beams > 1", ("length_penalty", "early_stopping"))]
    for condition, names in idle:
        unused = [name for name in names if options.pop(name) != getattr(GenerationSettings(), name)]
        if unused:
            say(f"generation.{', generation.'.join(unused)}: no effect without generation.{condition}")
    return {**options, "eos_token_id": list(tokenizer.stop_token_ids), "seed": settings.seed}


def check_prompt_lengths(prompts: Sequence[Sequence[int]], options: Mapping[str, Any], seq_length: int) -> None:
    """Checks all prompts before the first answer: one that is too long must not cost the answers to the others.

    Args:
        prompts: ids of each.
        options: from `generation_options`.
        seq_length: of the network, tokens.

    Raises:
        DataError: a prompt is too long.
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


def known_ids(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> list[int]:
    """Ids that the tokenizer has. The network may have more: an untrained one generates such padding ids too."""
    return [int(token) for token in ids if token < tokenizer.vocab_size]


def answer_text(tokenizer: SentencePieceTokenizer, ids: Sequence[int], stop_ids: Sequence[int] | None = None) -> str:
    """Generated ids as text, without the stop id at the end and surrounding white space.

    Args:
        tokenizer: of the network.
        ids: generated, without the prompt.
        stop_ids: ids that ended generation; None: those of the tokenizer.
    """
    ids = known_ids(tokenizer, ids)
    if ids and ids[-1] in (tokenizer.stop_token_ids if stop_ids is None else stop_ids):
        ids.pop()
    return tokenizer.decode(ids).strip()
