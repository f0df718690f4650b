"""Generation settings as arguments of `GLMForCausalLM.generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from glm_ms.settings import Settings
from glm_ms.settings.sections import GenerationSettings
from glm_ms.tokenizer import SentencePieceTokenizer


def generation_options(
    settings: Settings, tokenizer: SentencePieceTokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Keyword arguments of `generate`.

    An answer ends at the tokenizer's stop ids. Options of another way of decoding are left out with a line to the
    user: a YAML may hold `top_p` beside `do_sample: False`.
    """
    options = dataclasses.asdict(settings.generation)
    idle = [] if options["do_sample"] else [("do_sample: True", ("temperature", "top_k", "top_p"))]
    idle += [] if options["num_beams"] > 1 else [("num_beams > 1", ("length_penalty", "early_stopping"))]
    for condition, names in idle:
        unused = [name for name in names if options.pop(name) != getattr(GenerationSettings(), name)]
        if unused:
            say(f"generation.{', generation.'.join(unused)}: no effect without generation.{condition}")
    return {**options, "eos_token_id": list(tokenizer.stop_token_ids), "seed": settings.seed}


def known_ids(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> list[int]:
    """Ids without those of padded rows of the vocabulary, which stand for nothing and which only an untrained
    network picks."""
    return [int(token) for token in ids if token < tokenizer.vocab_size]


def answer_text(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> str:
    """Generated ids as text, without the stop id at the end and white space around.

    ChatGLM3 begins its answers with a line break, and may end them with the token of the next role.
    """
    ids = known_ids(tokenizer, ids)
    if ids and ids[-1] in tokenizer.stop_token_ids:
        ids.pop()
    return tokenizer.decode(ids).strip()
