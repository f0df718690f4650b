"""P-Tuning v2: trained keys and values before those of the tokens, in every layer. Liu et al. 2021, arXiv:2110.07602.

The encoder and its names are those of the original ChatGLM2 code (`PrefixEncoder`), computed in float32.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.convert.adapter_files import PREFIX
from glm_ms.model.config import FREE_FIELDS, GLMConfig
from glm_ms.model.glm import DROPOUTS_PER_BLOCK, GLMNetwork
from glm_ms.model.layers import DTYPES
from glm_ms.ops.portable import SeededDropout
from glm_ms.peft.adapter import Adapter, AdapterError, StoredAdapter
from glm_ms.storage.errors import capped
from glm_ms.storage.readers import read_object

HF_PREFIX = "transformer.prefix_encoder."
EMBEDDING, HIDDEN, OUTPUT = "embedding.weight", "trans.0", "trans.2"


@dataclass(frozen=True)
class PrefixConfig:
    """Settings of P-Tuning v2.

    Args:
        pre_seq_len: positions P of the prefix.
        prefix_projection: an MLP (linear, tanh, linear) follows the embedding.
        projection_dim: its width; None: the hidden size of the network.
        dropout: probability of zero on keys and values of the prefix, in training.
    """

    kind: ClassVar[str] = "ptuning2"
    pre_seq_len: int = 128
    prefix_projection: bool = False
    projection_dim: int | None = None
    dropout: float = 0.1

    def inner_width(self, network: GLMConfig) -> int | None:
        """Width of the MLP between embedding and prefix; None without one."""
        return (self.projection_dim or network.hidden_size) if self.prefix_projection else None


def prefix_shapes(network: GLMConfig, config: PrefixConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a prefix."""
    inner = config.inner_width(network)
    width = 2 * network.num_layers * network.num_kv_heads * network.kv_channels
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.pre_seq_len, width)}
    if inner is not None:
        shapes.update({f"{HIDDEN}.weight": (inner, width), f"{HIDDEN}.bias": (inner,)})
        shapes.update({f"{OUTPUT}.weight": (width, inner), f"{OUTPUT}.bias": (width,)})
    return shapes


def keys_and_values(tensors: Mapping[str, np.ndarray], network: GLMConfig) -> np.ndarray:
    """What a `PrefixEncoder` with these tensors gives without dropout, by NumPy: float32 [2 * layers, P, G, D].

    Keys of a layer are followed by its values. Keys are not rotated.
    """
    x = tensors[HF_PREFIX + EMBEDDING].astype(np.float32)
    if HF_PREFIX + f"{HIDDEN}.weight" in tensors:
        for name in (HIDDEN, OUTPUT):
            x = x @ tensors[f"{HF_PREFIX}{name}.weight"].T + tensors[f"{HF_PREFIX}{name}.bias"]
            x = np.tanh(x) if name == HIDDEN else x
    parts = x.reshape(len(x), 2 * network.num_layers, network.num_kv_heads, network.kv_channels)
    return np.ascontiguousarray(parts.swapaxes(0, 1))


class PrefixEncoder(nn.Cell):
    """Keys and values of P = `length` positions for every layer, from parameters that `generator` draws."""

    def __init__(self, network: GLMNetwork, config: PrefixConfig, generator: np.random.Generator) -> None:
        super().__init__()
        glm = network.config
        self.length, self.num_layers = config.pre_seq_len, glm.num_layers
        self.groups, self.dim, self.dtype = glm.num_kv_heads, glm.kv_channels, DTYPES[glm.compute_dtype]
        self.projected = config.prefix_projection
        shapes = prefix_shapes(glm, config)
        self.embedding = _drawn(shapes, EMBEDDING, generator)
        if self.projected:
            self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias = (
                _drawn(shapes, name, generator) for name in list(shapes)[1:]
            )
        stream = glm.num_layers * DROPOUTS_PER_BLOCK
        self.dropout = SeededDropout(config.dropout, stream) if config.dropout > 0 else None
        self.multiply, self.add, self.tanh = ops.MatMul(transpose_b=True), ops.Add(), ops.Tanh()
        self.cast, self.reshape, self.tile = ops.Cast(), ops.Reshape(), ops.Tile()
        self.split = ops.Split(axis=2, output_num=2 * glm.num_layers)

    def construct(self, batch: int, seeds: Tensor | None) -> tuple[tuple[Tensor, Tensor], ...]:
        """Batch size B, seeds int32 [B] or None for no dropout -> for each layer (keys, values), [B, P, G, D] each, of
        the compute type. Keys are not rotated."""
        x = self.embedding
        if self.projected:
            x = self.tanh(self.add(self.multiply(x, self.hidden_weight), self.hidden_bias))
            x = self.add(self.multiply(x, self.output_weight), self.output_bias)
        whole = (1, self.length, 2 * self.num_layers, self.groups, self.dim)
        x = self.tile(self.reshape(self.cast(x, self.dtype), whole), (batch, 1, 1, 1, 1))
        if self.dropout is not None and seeds is not None:
            x = self.dropout(x, seeds)
        parts = self.split(x)
        shape = (batch, self.length, self.groups, self.dim)
        layers = ()  # type: tuple
        for i in range(self.num_layers):
            layers += ((self.reshape(parts[2 * i], shape), self.reshape(parts[2 * i + 1], shape)),)
        return layers


class PrefixAdapter(Adapter):
    """P-Tuning v2 on a network."""

    kind = "ptuning2"
    config_class = PrefixConfig

    @classmethod
    def attach(
        cls, network: GLMNetwork, config: PrefixConfig, seed: int, stored: StoredAdapter | None
    ) -> PrefixAdapter:
        """The `config.json` beside a stored prefix must describe this network: shapes do not show all of it."""
        if stored is not None:
            check_network(stored.path, network.config)
        adapter = cls(network, config)
        encoder = PrefixEncoder(network, config, np.random.default_rng(seed))
        adapter._parameters = {parameter.name: parameter for parameter in encoder.get_parameters()}
        network.transformer.prefix_encoder = encoder
        for name, parameter in adapter._parameters.items():
            parameter.name = name  # attaching has added the names of the cells around it
        return adapter

    def detach(self) -> None:
        self.network.transformer.prefix_encoder = None

    @classmethod
    def stored_config(cls, path: Path, tensors: Mapping[str, np.ndarray]) -> PrefixConfig:
        """The tensors give the sizes, which a `config.json` must confirm; the dropout is not stored and becomes 0."""
        embedding, hidden = tensors.get(HF_PREFIX + EMBEDDING), tensors.get(f"{HF_PREFIX}{HIDDEN}.weight")
        for name, value in ((EMBEDDING, embedding), (f"{HIDDEN}.weight", hidden)):
            if (value is None and name == EMBEDDING) or (value is not None and (value.ndim != 2 or not value.size)):
                raise AdapterError(f"{path}: has no {HF_PREFIX}{name} [positions, width]")
        assert embedding is not None
        found: dict[str, Any] = {"pre_seq_len": int(embedding.shape[0]), "prefix_projection": hidden is not None}
        for key, value in _document(path).items():
            if key in found and value is not None and value != found[key]:
                raise AdapterError(f"{path}: {key} is {found[key]}, but the {PREFIX.config} beside it says {value!r}")
        return PrefixConfig(**found, projection_dim=None if hidden is None else int(hidden.shape[0]), dropout=0.0)

    @classmethod
    def write_config(cls, folder: Path, config: PrefixConfig, network: GLMConfig, base_model: str) -> None:
        """Writes the `config.json` of the network with `pre_seq_len`."""
        own = {"pre_seq_len": config.pre_seq_len, "prefix_projection": config.prefix_projection}
        document = {**network.to_hf_dict(), **own, "_name_or_path": base_model}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (folder / PREFIX.config).write_text(text, encoding="utf-8")

    @classmethod
    def shapes(
        cls, config: PrefixConfig, network: GLMConfig, base: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        return {HF_PREFIX + name: shape for name, shape in prefix_shapes(network, config).items()}

    @classmethod
    def differences(cls, stored: StoredAdapter, wanted: PrefixConfig, network: GLMNetwork) -> list[str]:
        """A stored adapter always has the width of its MLP."""
        wanted = dataclasses.replace(wanted, projection_dim=wanted.inner_width(network.config))
        return super().differences(stored, wanted, network)


def _document(path: Path) -> dict[str, Any]:
    """The `config.json` beside the file of a prefix; empty without one."""
    file = path.parent / PREFIX.config
    return read_object(file, AdapterError) if file.is_file() else {}


def check_network(path: Path, network: GLMConfig) -> None:
    """Raises AdapterError if the `config.json` beside a prefix describes another network."""
    document = _document(path)
    if document:
        document.setdefault("rope_ratio", GLMConfig.rope_ratio)  # older code does not know it
    different = [
        f"{name}: {value!r}, in this network {getattr(network, name)!r}"
        for name, value in document.items()
        if name in network.to_dict() and name not in FREE_FIELDS and value != getattr(network, name)
    ]
    if different:
        raise AdapterError(f"{path}: made for another base: {PREFIX.config} beside it has {capped(different)}")


def _drawn(shapes: dict[str, tuple[int, ...]], name: str, generator: np.random.Generator) -> Parameter:
    """A parameter as torch initialises it: normal for an embedding, uniform in 1 / sqrt(inputs) for a linear layer."""
    shape = shapes[name]
    if name == EMBEDDING:
        values = generator.standard_normal(shape)
    else:
        bound = 1 / math.sqrt(shapes[name.rpartition(".")[0] + ".weight"][1])
        values = generator.uniform(-bound, bound, shape)
    return Parameter(Tensor(values.astype(np.float32)), name=HF_PREFIX + name)
