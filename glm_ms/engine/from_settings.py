"""Tokenizer, data sets and options of generation from the settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.engine.process import Say
from glm_ms.families import build_encoder
from glm_ms.settings import Settings
from glm_ms.settings.schema import EvalDatasetSettings, GenerationSettings, TrainDatasetSettings, bias_pairs
from glm_ms.tokenizer import SentencePieceTokenizer


def labelled_rows(
    data: TrainDatasetSettings | EvalDatasetSettings, tokenizer: SentencePieceTokenizer, say: Say | None = None
) -> TrainDataset:
    """The rows with labels of a section, cached on disk if it has a `cache_dir`; `say` takes a line about the cache.

    Raises DataError if the records or the keys cannot be used.
    """
    cache = None
    if isinstance(data, TrainDatasetSettings) and data.cache_dir is not None:
        cache = CacheRequest(data.cache_dir, data.num_parallel_workers)
    return TrainDataset(data.data_loader.dataset_dir, build_encoder(data, tokenizer), data.num_samples, cache, say)


def prompts_with_references(
    data: EvalDatasetSettings, tokenizer: SentencePieceTokenizer, generation: GenerationSettings
) -> EvalDataset:
    """The prompts of a section, with reference texts. Raises DataError if the records or the keys cannot be used."""
    most = None
    if data.max_seq_length is not None:
        room = generation.max_new_tokens if generation.max_length is None else 1
        most = min(data.max_seq_length, generation.max_length or data.max_seq_length) - room
    return EvalDataset(data.data_loader.dataset_dir, build_encoder(data, tokenizer, most), data.num_samples)


def generation_options(settings: Settings, tokenizer: SentencePieceTokenizer, say: Say) -> dict[str, Any]:
    """Keyword arguments of `GLMForCausalLM.generate`. An answer ends at the tokenizer's stop ids.

    Options without effect are left out with a line to the user: a YAML may have `top_p` beside `do_sample: False`.
    """
    options = dataclasses.asdict(settings.generation)
    options["logit_bias"] = dict(bias_pairs(settings.generation.logit_bias)) or None
    for condition, applies, names in (
        ("do_sample: True", options["do_sample"], ("temperature", "top_k", "top_p", "min_p")),
        ("num_beams > 1", options["num_beams"] > 1, ("length_penalty", "early_stopping")),
    ):
        unused = [] if applies else [n for n in names if options.pop(n) != getattr(GenerationSettings(), n)]
        if unused:
            say(f"generation.{', generation.'.join(unused)}: no effect without generation.{condition}")
    return {**options, "eos_token_id": list(tokenizer.stop_token_ids), "seed": settings.seed}
