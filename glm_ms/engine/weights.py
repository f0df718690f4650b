"""The model a run begins with: architecture from the settings, weights from load_checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glm_ms.convert import CheckpointError, load_parameters, open_checkpoint
from glm_ms.convert.run_folder import resolve_checkpoint
from glm_ms.generation import GLMForCausalLM
from glm_ms.model.config import GLMConfig
from glm_ms.settings import Settings, resolve_vocab_size
from glm_ms.settings.schema import AUTO

# Fields that may differ from the config.json beside the weights: storage, length and training, not the function.
_FREE = frozenset(
    {"seq_length", "param_init_type", "compute_dtype", "hidden_dropout", "attention_dropout",
     "eos_token_id", "pad_token_id"}
)  # fmt: skip
_EMBEDDING = "transformer.embedding.embedding_table"


def build_model(
    settings: Settings, vocab_size: int, say: Callable[[str], None], checkpoint: Path | None = None
) -> GLMForCausalLM:
    """Builds the network of a run and loads its weights.

    `padded_vocab_size: auto` becomes the size of the checkpoint, or without one that of the tokenizer.

    Args:
        settings: the run.
        vocab_size: ids of the tokenizer.
        say: takes lines for the user.
        checkpoint: weights to load in place of `load_checkpoint`.

    Raises:
        CheckpointError: the weights cannot be read, or do not belong to the configured network.
        SettingsError: the vocabulary does not fit the tokenizer.
    """
    if checkpoint is None and settings.load_checkpoint:
        checkpoint = resolve_checkpoint(settings.load_checkpoint)
    if checkpoint is None:
        resolve_vocab_size(settings, vocab_size)
        say("weights: random")
        return GLMForCausalLM(settings.glm_config())
    with open_checkpoint(checkpoint) as reader:
        model_config = settings.model.model_config
        if model_config.padded_vocab_size == AUTO and _EMBEDDING in reader.names():
            model_config.padded_vocab_size = reader.shape(_EMBEDDING)[0]
        resolve_vocab_size(settings, vocab_size)
        config = settings.glm_config()
        _check_config_beside(
            checkpoint, config, settings
        )  # shapes alone do not tell head sizes or rope_ratio
        say(f"weights: {checkpoint}")
        dtype = "float16" if config.param_init_type == "float16" else "float32"
        return GLMForCausalLM.from_parameters(config, load_parameters(reader, config, dtype))


def _check_config_beside(checkpoint: Path, config: GLMConfig, settings: Settings) -> None:
    """Holds the settings to the config.json that lies beside the weights."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / "config.json").is_file():
        return
    stored = GLMConfig.from_pretrained(folder)
    different = [
        f"model.model_config.{name}: {value}, in config.json {getattr(stored, name)}"
        for name, value in config.to_dict().items()
        if name not in _FREE and value != getattr(stored, name)
    ]
    if different:
        raise CheckpointError(
            f"{folder / 'config.json'} and {settings.source} describe different networks: {'; '.join(different)}"
        )
