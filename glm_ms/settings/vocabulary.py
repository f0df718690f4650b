"""`padded_vocab_size: auto`, and a fixed size that must hold the tokenizer."""

from __future__ import annotations

from glm_ms.settings.errors import SettingsError
from glm_ms.settings.schema import AUTO, Settings

# Rows are padded to a multiple of this, which splits evenly over cards and suits matrix units.
VOCAB_MULTIPLE = 64
_KEY = "model.model_config.padded_vocab_size"


def resolve_vocab_size(settings: Settings, vocab_size: int) -> int:
    """Settles `model.model_config.padded_vocab_size` once the tokenizer is known.

    Args:
        settings: `auto` is replaced in place by `vocab_size` rounded up to a multiple of 64.
        vocab_size: ids of the tokenizer, special tokens included: the highest id + 1.

    Returns:
        The padded size.

    Raises:
        SettingsError: a fixed size is smaller than the vocabulary.
    """
    config = settings.model.model_config
    if config.padded_vocab_size == AUTO:
        config.padded_vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    elif config.padded_vocab_size < vocab_size:
        raise SettingsError(
            f"{settings.where(_KEY)}: {_KEY}: {config.padded_vocab_size} is too small for the tokenizer "
            f"{settings.processor.tokenizer.vocab_file}, which has {vocab_size} ids; use {_KEY}=auto, "
            "or the tokenizer that belongs to the model"
        )
    return config.padded_vocab_size
