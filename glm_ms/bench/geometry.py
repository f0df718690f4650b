"""Geometries of networks that are measured: names, and sizes given one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from glm_ms.families import read_config
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.storage.suggest import did_you_mean

# Name -> fields of `GLMConfig`; what is missing is that of the 6B.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "6b": {},
    "w6b-l4": {"num_layers": 4},
    "m265": {
        "num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 2816, "kv_channels": 64, "num_attention_heads": 16,
    },
    "tiny": {
        "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 344, "kv_channels": 32, "num_attention_heads": 4,
        "padded_vocab_size": 1024,
    },
}  # fmt: skip
# Fields that a command line may give in place of those of a name.
SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads", "multi_query_group_num",
    "padded_vocab_size",
)  # fmt: skip
_SHORTEST = 64


def geometry(name: str, sizes: dict[str, Any], tokens: int) -> GLMConfig:
    """The network of a name, or of a config.json, YAML or folder.

    Args:
        sizes: fields of `GLMConfig` that replace those of the name.
        tokens: longest sequence; `seq_length` becomes a power of two from it on.

    Raises:
        ConfigError: the name is unknown, or the sizes do not fit each other.
    """
    if name in GEOMETRIES:
        found = GLMConfig(**{**GEOMETRIES[name], **sizes})
    elif Path(name).exists():
        found = dataclasses.replace(read_config(name), **sizes)
    else:
        hint = did_you_mean(name, GEOMETRIES)
        raise ConfigError(f"geometry {name!r}: unknown{hint}; known: {', '.join(GEOMETRIES)}, or a path to a config")
    length = _SHORTEST
    while length < tokens:
        length *= 2
    return dataclasses.replace(found, seq_length=length, param_init_type="float32", compute_dtype="float32")


def matrix_elements(config: GLMConfig) -> int:
    """Elements of the matrices that a step reads: all but the embedding."""
    qkv, dense = config.qkv_size * config.hidden_size, config.query_size * config.hidden_size
    mlp = 3 * config.ffn_hidden_size * config.hidden_size
    return config.num_layers * (qkv + dense + mlp) + config.padded_vocab_size * config.hidden_size
