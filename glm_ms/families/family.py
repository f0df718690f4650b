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

    The tokenizer class has the prompt template and the stop tokens; its name is `processor.tokenizer.type` of a
    configuration. The encoder class encodes records of prompt and answer; its `layout` decides about positions and
    mask. The class of the configuration has the defaults and the `model_type` of its `config.json`.
    """

    name: str  # the key in FAMILIES
    generation: int  # `model_generation` in a tokenizer_config.json, which tells apart families with one vocabulary
    tokenizer: type[SentencePieceTokenizer]
    encoder: type[Encoder]
    config: type[GLMConfig] = GLMConfig
    network: str = "glm_ms.model.glm:GLMNetwork"  # "module:Class", called with configuration and cells
    parameter_names: Mapping[str, str] = field(default_factory=dict)  # Hugging Face's -> here, those that differ
    aliases: Mapping[str, str] = field(default_factory=dict)  # further names understood when reading -> here
    released: tuple[str, ...] = ()  # names of the released models

    def build_network(self, config: GLMConfig, cells: Any = None) -> Any:
        """The network with random weights, built of `glm_ms.model.glm.Cells`; None: the plain ones. Imports
        MindSpore."""
        module, _, name = self.network.partition(":")
        return getattr(importlib.import_module(module), name)(config, cells)
