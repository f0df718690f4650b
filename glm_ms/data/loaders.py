"""From the keys of a `train_dataset` or `eval_dataset` section to the encoder of its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from glm_ms.data.adgen import AdgenEncoder
from glm_ms.data.chat import ConversationEncoder, ToolAlpacaEncoder
from glm_ms.data.encoder import Encoder
from glm_ms.storage.errors import DataError

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer


class Section(Protocol):
    """The keys that decide; see `glm_ms.settings.sections`. `data_loader` has `type` and `origin_columns`."""

    data_loader: Any
    max_source_length: int
    max_target_length: int
    max_seq_length: int | None
    ignore_pad_token_for_loss: bool


def section_encoder(
    section: Section, tokenizer: SentencePieceTokenizer, max_prompt_length: int | None = None
) -> Encoder:
    """What `data_loader.type` and the lengths of a section make of a record.

    Args:
        section: of a configuration.
        tokenizer: of the records.
        max_prompt_length: see `ToolAlpacaEncoder`; other loaders have `max_source_length`.

    Raises:
        DataError: keys that cannot be used.
    """
    kind = section.data_loader.type
    if kind == "ConversationDataLoader":
        return ConversationEncoder(tokenizer, section.max_source_length, section.max_target_length)
    if kind == "ToolAlpacaDataLoader":
        if section.max_seq_length is None:
            raise DataError("max_seq_length: missing; ToolAlpacaDataLoader needs the tokens of a row")
        return ToolAlpacaEncoder(tokenizer, section.max_seq_length, max_prompt_length)
    if kind != "ADGenDataLoader":
        raise DataError(f"data_loader.type: {kind!r} is not known")
    return AdgenEncoder(
        tokenizer,
        section.data_loader.origin_columns,
        section.max_source_length,
        section.max_target_length,
        section.ignore_pad_token_for_loss,
    )
