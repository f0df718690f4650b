"""The data sets of a `train_dataset` or `eval_dataset` section."""

from __future__ import annotations

from collections.abc import Callable

from glm_ms.data import (
    AdgenEncoder,
    AdgenEvalDataset,
    CacheRequest,
    ConversationEncoder,
    DataError,
    Encoder,
    EvalDataset,
    ToolAlpacaEncoder,
    TrainDataset,
)
from glm_ms.settings.sections import EvalDatasetSettings, GenerationSettings, TrainDatasetSettings
from glm_ms.tokenizer import SentencePieceTokenizer


def row_encoder(
    data: TrainDatasetSettings | EvalDatasetSettings,
    tokenizer: SentencePieceTokenizer,
    max_prompt_length: int | None = None,
) -> Encoder:
    """What `data_loader.type` and the lengths of a section make of a record.

    Args:
        data: the section.
        tokenizer: of the records.
        max_prompt_length: see `ToolAlpacaEncoder`.

    Raises:
        DataError: keys that cannot be used.
    """
    kind = data.data_loader.type
    if kind == "ConversationDataLoader":
        return ConversationEncoder(tokenizer, data.max_source_length, data.max_target_length)
    if kind == "ToolAlpacaDataLoader":
        if data.max_seq_length is None:
            raise DataError("max_seq_length: missing; ToolAlpacaDataLoader needs the tokens of a row")
        return ToolAlpacaEncoder(tokenizer, data.max_seq_length, max_prompt_length)
    return AdgenEncoder(
        tokenizer,
        data.data_loader.origin_columns,
        data.max_source_length,
        data.max_target_length,
        data.ignore_pad_token_for_loss,
    )


def labelled_rows(
    data: TrainDatasetSettings | EvalDatasetSettings,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None] | None = None,
) -> TrainDataset:
    """The rows with labels of a section, kept on disk if it has a `cache_dir`.

    Args:
        data, tokenizer: as `row_encoder`.
        say: takes a line for the user about the cache.

    Raises:
        DataError: the records or the keys cannot be used.
    """
    cache = None
    if isinstance(data, TrainDatasetSettings) and data.cache_dir is not None:
        cache = CacheRequest(data.cache_dir, data.num_parallel_workers)
    return TrainDataset(
        data.data_loader.dataset_dir, row_encoder(data, tokenizer), data.num_samples, cache, say
    )


def prompts_with_references(
    data: EvalDatasetSettings, tokenizer: SentencePieceTokenizer, generation: GenerationSettings
) -> EvalDataset:
    """What is to be generated from the records of a section, and the texts to compare with.

    Raises:
        DataError: the records or the keys cannot be used.
    """
    path, num_samples = data.data_loader.dataset_dir, data.num_samples
    if data.data_loader.type == "ADGenDataLoader":
        lengths = data.max_source_length, data.max_target_length
        return AdgenEvalDataset(path, tokenizer, data.data_loader.origin_columns, *lengths, num_samples)
    most = None
    if data.max_seq_length is not None:
        room = generation.max_new_tokens if generation.max_length is None else 1
        most = min(data.max_seq_length, generation.max_length or data.max_seq_length) - room
    return EvalDataset(path, row_encoder(data, tokenizer, most), num_samples)
