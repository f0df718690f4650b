"""P-Tuning v2: learnt keys and values before those of the tokens, in every layer. Liu et al. 2021, arXiv:2110.07602.

The encoder and its names are those of the original ChatGLM2 code (`PrefixEncoder`), computed in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.convert.adapter_files import PREFIX
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import DROPOUTS_PER_BLOCK, GLMNetwork
from glm_ms.model.layers import DTYPES
from glm_ms.ops.dropout import SeededDropout
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.parameters import assign_all, stored_tensors

CONFIG_FILE, WEIGHTS_FILE = PREFIX.config, PREFIX.weights
HF_PREFIX = "transformer.prefix_encoder."
EMBEDDING, HIDDEN, OUTPUT = "embedding.weight", "trans.0", "trans.2"


@dataclass(frozen=True)
class PrefixConfig:
    """What `pet_config` says of P-Tuning v2.

    Args:
        pre_seq_len: positions P of the prefix.
        prefix_projection: an MLP (linear, tanh, linear) follows the embedding.
        projection_dim: its width; None: the hidden size of the network.
        dropout: probability of zero on keys and values of the prefix while training.
    """

    pre_seq_len: int = 128
    prefix_projection: bool = False
    projection_dim: int | None = None
    dropout: float = 0.1


def prefix_shapes(config: GLMConfig, length: int, inner: int | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of a prefix.

    Args:
        config: of the network it stands before.
        length: positions.
        inner: width of the MLP between embedding and prefix, None without one.
    """
    width = 2 * config.num_layers * config.num_kv_heads * config.kv_channels
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (length, width)}
    if inner is not None:
        shapes.update({f"{HIDDEN}.weight": (inner, width), f"{HIDDEN}.bias": (inner,)})
        shapes.update({f"{OUTPUT}.weight": (width, inner), f"{OUTPUT}.bias": (width,)})
    return shapes


class PrefixEncoder(nn.Cell):
    """Keys and values of P positions for every layer, from parameters alone.

    Args:
        network: the network it stands before.
        config: sizes and dropout.
        generator: draws the parameters as torch draws those of Embedding and Linear.

    Attributes:
        length: P.
    """

    def __init__(self, network: GLMNetwork, config: PrefixConfig, generator: np.random.Generator) -> None:
        super().__init__()
        glm = network.config
        self.length, self.num_layers = config.pre_seq_len, glm.num_layers
        self.groups, self.dim, self.dtype = glm.num_kv_heads, glm.kv_channels, DTYPES[glm.compute_dtype]
        self.projected = config.prefix_projection
        inner = (config.projection_dim or glm.hidden_size) if self.projected else None
        shapes = prefix_shapes(glm, self.length, inner)
        self.embedding = _drawn(shapes, EMBEDDING, generator)
        if self.projected:
            self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias = (
                _drawn(shapes, name, generator) for name in list(shapes)[1:]
            )
        stream = glm.num_layers * DROPOUTS_PER_BLOCK
        self.dropout = SeededDropout(config.dropout, stream) if config.dropout > 0 else None
        self.multiply = ops.MatMul(transpose_b=True)
        self.add = ops.Add()
        self.tanh = ops.Tanh()
        self.cast, self.reshape = ops.Cast(), ops.Reshape()
        self.tile = ops.Tile()
        self.split = ops.Split(axis=2, output_num=2 * glm.num_layers)

    def construct(self, batch: int, seeds: Tensor | None) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values of every layer.

        Args:
            batch: rows B.
            seeds: int32 [B]; None: no dropout.

        Returns:
            For each layer (keys, values), [B, P, G, D] each, of the compute type. Keys are not turned.
        """
        x = self.embedding
        if self.projected:
            x = self.tanh(self.add(self.multiply(x, self.hidden_weight), self.hidden_bias))
            x = self.add(self.multiply(x, self.output_weight), self.output_bias)
        shape = (1, self.length, 2 * self.num_layers, self.groups, self.dim)
        x = self.tile(self.reshape(self.cast(x, self.dtype), shape), (batch, 1, 1, 1, 1))
        if self.dropout is not None and seeds is not None:
            x = self.dropout(x, seeds)
        parts = self.split(x)
        shape = (batch, self.length, self.groups, self.dim)
        layers = ()
        for i in range(self.num_layers):
            layers += ((self.reshape(parts[2 * i], shape), self.reshape(parts[2 * i + 1], shape)),)
        return layers


class PrefixAdapter:
    """P-Tuning v2 on a network, which is frozen.

    Args:
        network: gets the prefix.
        config: sizes and dropout.
        seed: of the random start.
    """

    kind = "ptuning2"

    def __init__(self, network: GLMNetwork, config: PrefixConfig, seed: int = 0) -> None:
        self.config = config
        self._glm = network.config
        encoder = PrefixEncoder(network, config, np.random.default_rng(seed))
        self._parameters = {parameter.name: parameter for parameter in encoder.get_parameters()}
        network.transformer.prefix_encoder = encoder
        for name, parameter in self._parameters.items():
            parameter.name = name  # attaching has put the place of the cell before it

    def parameters(self) -> list[Parameter]:
        """The parameters of the encoder, float32."""
        return list(self._parameters.values())

    def assign(self, tensors: Mapping[str, np.ndarray], source: Path) -> None:
        """Overwrites every parameter; `tensors` by their official names.

        Raises:
            AdapterError: names or shapes differ.
        """
        assign_all(self._parameters, tensors, source)

    def restore(self, folder: Path) -> None:
        """Overwrites every parameter with what `save` has written.

        Raises:
            CheckpointError: the file is missing or damaged, or holds other tensors.
        """
        path = folder / WEIGHTS_FILE
        self.assign(stored_tensors(path), path)

    def save(self, folder: Path, base_model: str = "") -> None:
        """Writes `prefix_encoder.safetensors` under the official names, and `config.json` with `pre_seq_len`.

        Args:
            folder: an existing folder without these files.
            base_model: where the base weights came from, for the reader of the file.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        arrays = (parameter.asnumpy() for parameter in self._parameters.values())
        write_safetensors(folder / WEIGHTS_FILE, shapes, "float32", arrays, {"format": "pt"})
        write_config(folder, self.config, self._glm, base_model)


def write_config(folder: Path, config: PrefixConfig, network: GLMConfig, base_model: str) -> None:
    """Writes the `config.json` of the network, with `pre_seq_len`, into an existing folder."""
    document = {
        **network.to_hf_dict(),
        "pre_seq_len": config.pre_seq_len,
        "prefix_projection": config.prefix_projection,
        "_name_or_path": base_model,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def prefix_config_of(tensors: Mapping[str, np.ndarray], source: Path) -> PrefixConfig:
    """The sizes that stored tensors tell; dropout is 0, which they do not tell.

    Raises:
        AdapterError: there is no embedding of two axes, or half an MLP.
    """
    embedding = tensors.get(HF_PREFIX + EMBEDDING)
    if embedding is None or embedding.ndim != 2:
        raise AdapterError(f"{source}: holds no {HF_PREFIX}{EMBEDDING} [positions, width]")
    hidden = tensors.get(f"{HF_PREFIX}{HIDDEN}.weight")
    inner = None if hidden is None else int(hidden.shape[0])
    return PrefixConfig(int(embedding.shape[0]), hidden is not None, inner, 0.0)


def _drawn(shapes: dict[str, tuple[int, ...]], name: str, generator: np.random.Generator) -> Parameter:
    """A parameter as torch begins it: normal for an embedding, uniform in 1 / sqrt(inputs) for a linear layer."""
    shape = shapes[name]
    if name == EMBEDDING:
        values = generator.standard_normal(shape)
    else:
        bound = 1 / math.sqrt(shapes[name.rpartition(".")[0] + ".weight"][1])
        values = generator.uniform(-bound, bound, shape)
    return Parameter(Tensor(values.astype(np.float32)), name=HF_PREFIX + name)
