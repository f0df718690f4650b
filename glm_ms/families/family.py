"""What the package must know about a family of models: `Family`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glm_ms.data.encoder import Encoder
from glm_ms.model.config import GLMConfig
from glm_ms.tokenizer import SentencePieceTokenizer


@dataclass(frozen=True)
class Family:
    """A family of models. Families may share a network and its configuration.

    Attributes:
        name: short name, the key in FAMILIES.
        generation: `model_generation` in a tokenizer_config.json, which tells apart families with one vocabulary.
        tokenizer: its class, whose name is `processor.tokenizer.type` of a configuration. It has the prompt template
            and the stop tokens.
        encoder: class that encodes records of prompt and answer. Its `layout` decides about positions and mask.
        config: class of the configuration, with its defaults and the `model_type` of its `config.json`.
        network: "module:Class" of the network, called with a configuration.
        parameter_names: Hugging Face name -> name in this package, for the parameters whose names differ.
        aliases: further names understood when reading -> name in this package.
        released: names of the released models.
    """

    name: str
    generation: int
    tokenizer: type[SentencePieceTokenizer]
    encoder: type[Encoder]
    config: type[GLMConfig] = GLMConfig
    network: str = "glm_ms.model.glm:GLMNetwork"
    parameter_names: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    released: tuple[str, ...] = ()

    def build_network(self, config: GLMConfig) -> Any:
        """The network with random weights. Imports MindSpore."""
        module, _, name = self.network.partition(":")
        return getattr(importlib.import_module(module), name)(config)
