"""The families of models: FAMILIES, and what follows from it.

A new family is a `Family` and a line in FAMILIES.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm_ms.data.encoder import Encoder, Section
from glm_ms.data.formats import FORMATS, DataFormat
from glm_ms.data.source_target import PlainEncoder
from glm_ms.families.chatglm import CHATGLM2, CHATGLM3
from glm_ms.families.family import Family
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.storage.errors import DataError, FileError
from glm_ms.storage.paths import path_problem
from glm_ms.storage.readers import read_object
from glm_ms.tokenizer import SentencePieceTokenizer
from glm_ms.tokenizer.base import PLAIN

__all__ = [
    "FAMILIES",
    "Family",
    "build_encoder",
    "build_tokenizer",
    "encoder_of",
    "family_of",
    "read_config",
    "tokenizer_names",
]

FAMILIES: dict[str, Family] = {"chatglm2": CHATGLM2, "chatglm3": CHATGLM3}


def family_of(item: str | SentencePieceTokenizer | GLMConfig) -> Family:
    """The family of a name, of a tokenizer or its class name, or of a configuration.

    A configuration belongs to the first family of its class: families that share it have the same network.

    Raises:
        KeyError: no family has it.
    """
    kinds: dict[Any, Family] = {}
    for name, family in FAMILIES.items():
        for key in (name, family.tokenizer.__name__, family.tokenizer, family.config):
            kinds.setdefault(key, family)
    for kind in [item] if isinstance(item, str) else type(item).__mro__:
        if kind in kinds:
            return kinds[kind]
    raise KeyError(f"{item!r}: belongs to none of the model families {', '.join(FAMILIES)}")


def tokenizer_names() -> tuple[str, ...]:
    """The values of `processor.tokenizer.type`."""
    return tuple(family.tokenizer.__name__ for family in FAMILIES.values())


def build_encoder(section: Section, tokenizer: SentencePieceTokenizer, max_prompt_length: int | None = None) -> Encoder:
    """The encoder of the records of a `train_dataset` or `eval_dataset` section; see `Encoder`.

    Raises:
        DataError: keys that cannot be used.
    """
    data_format = FORMATS.get(section.data_loader.type)
    if data_format is None:
        raise DataError(f"data_loader.type: {section.data_loader.type!r} is not known; use one of {', '.join(FORMATS)}")
    if tokenizer.template == PLAIN and data_format.encoder is not None:
        raise DataError(f"{section.data_loader.type} needs a chat template, but that of the tokenizer is {PLAIN}")
    encoder = encoder_of(data_format, family_of(tokenizer), tokenizer.template)
    return encoder(tokenizer, data_format, section, max_prompt_length)


def encoder_of(data_format: DataFormat, family: Family, template: str) -> type[Encoder]:
    """The class that encodes records of a format for a family and a template of `SentencePieceTokenizer`."""
    return data_format.encoder or (PlainEncoder if template == PLAIN else family.encoder)


def build_tokenizer(section: Any) -> SentencePieceTokenizer:
    """The tokenizer of a `processor.tokenizer` section.

    Raises:
        VocabularyError: the vocabulary cannot be used.
    """
    return family_of(section.type).tokenizer(section.vocab_file, template=section.template)


def read_config(path: str | Path, with_prefix: bool = False) -> GLMConfig:
    """The configuration of a Hugging Face folder, a `config.json` or a YAML of this project.

    The `model_type` of a `config.json` decides about the family.

    `with_prefix`, and errors, as of `GLMConfig.from_pretrained`.
    """
    if problem := path_problem(path):
        raise ConfigError(problem)
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    kinds = {family.config.model_type: family.config for family in FAMILIES.values()}
    try:
        model_type = read_object(file).get("model_type")
    except FileError:  # another kind of file, or a broken one: the class says what is wrong with it
        model_type = None
    kind = kinds.get(model_type) if isinstance(model_type, str) else None
    return (kind or GLMConfig).from_pretrained(path, with_prefix)
