"""Generation settings as arguments of `GLMForCausalLM.generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer


def generation_options(settings: Settings, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Keyword arguments of `generate`.

    An answer ends at the tokenizer's stop ids. Options of another way of decoding are left out: a YAML may hold
    `top_p` beside `do_sample: False`.
    """
    options = dataclasses.asdict(settings.generation)
    if not options["do_sample"]:
        for name in ("temperature", "top_k", "top_p"):
            del options[name]
    if options["num_beams"] == 1:
        for name in ("length_penalty", "early_stopping"):
            del options[name]
    return {**options, "eos_token_id": list(tokenizer.stop_token_ids), "seed": settings.seed}


def answer_text(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> str:
    """Generated ids as text, without the stop id at the end and white space around.

    ChatGLM3 begins its answers with a line break, and may end them with the token of the next role.
    """
    ids = list(ids)
    if ids and ids[-1] in tokenizer.stop_token_ids:
        ids.pop()
    return tokenizer.decode(ids).strip()
