"""The tokenizer and the data sets that the settings name."""

from __future__ import annotations

from collections.abc import Callable

from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.families import build_encoder, family_of
from glm_ms.settings import Settings
from glm_ms.settings.schema import EvalDatasetSettings, GenerationSettings, TrainDatasetSettings
from glm_ms.tokenizer import SentencePieceTokenizer


def labelled_rows(
    data: TrainDatasetSettings | EvalDatasetSettings,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None] | None = None,
) -> TrainDataset:
    """The rows with labels of a section, cached on disk if it has a `cache_dir`.

    Args:
        data: the section.
        tokenizer: of the records.
        say: takes a line for the user about the cache.

    Raises:
        DataError: the records or the keys cannot be used.
    """
    cache = None
    if isinstance(data, TrainDatasetSettings) and data.cache_dir is not None:
        cache = CacheRequest(data.cache_dir, data.num_parallel_workers)
    return TrainDataset(data.data_loader.dataset_dir, build_encoder(data, tokenizer), data.num_samples, cache, say)


def prompts_with_references(
    data: EvalDatasetSettings, tokenizer: SentencePieceTokenizer, generation: GenerationSettings
) -> EvalDataset:
    """The prompts of a section, and the reference texts that answers are compared with.

    Raises:
        DataError: the records or the keys cannot be used.
    """
    most = None
    if data.max_seq_length is not None:
        room = generation.max_new_tokens if generation.max_length is None else 1
        most = min(data.max_seq_length, generation.max_length or data.max_seq_length) - room
    return EvalDataset(data.data_loader.dataset_dir, build_encoder(data, tokenizer, most), data.num_samples)


def build_tokenizer(settings: Settings) -> SentencePieceTokenizer:
    """The tokenizer of `processor.tokenizer`."""
    chosen = settings.processor.tokenizer
    return family_of(chosen.type).tokenizer(chosen.vocab_file)
