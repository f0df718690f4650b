"""The network on the C++ kernels of the CPU: one graph for prompts and steps, over the network's own parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from glm_ms.model.glm import GLMBlock, GLMNetwork
from glm_ms.ops.cpu.operators import linear_inputs, norm_inputs, operator
from glm_ms.ops.portable import rotary_tables

# Parameters and tensors that an operator reads, and numbers.
Part = tuple[Sequence[Any], Sequence[float]]


class KernelCall(nn.Cell):
    """An operator with what it reads of the network.

    Args:
        name, shape, dtype: as of `operator`.
        parts: in the order of the operator.
        numbers: its first numbers, before those of the parts.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], parts: Sequence[Part], numbers: Sequence[float] = (),
        dtype: ms.Type = ms.float32
    ) -> None:  # fmt: skip
        super().__init__(auto_prefix=False)
        self.operator = operator(name, shape, dtype)
        self.numbers = Tensor(np.array([*numbers, *(one for _, some in parts for one in some)], np.float64))
        self.arrays = tuple(array for arrays, _ in parts for array in arrays)

    def construct(self, *inputs: Tensor) -> Tensor:
        """Table of the run, rows and what else the operator takes before its numbers -> rows."""
        return self.operator(*inputs, self.numbers, *self.arrays)


class KernelBlock(nn.Cell):
    """A `GLMBlock` in three operators: attention, its output projection, MLP.

    Args:
        layer: number of the block.
        rows: R, most rows of a run.
    """

    def __init__(self, network: GLMNetwork, layer: int, rows: int) -> None:
        super().__init__(auto_prefix=False)
        config = network.config
        block: GLMBlock = network.transformer.encoder.layers[layer]
        attention, mlp, hidden = block.self_attention, block.mlp, (rows, config.hidden_size)
        first, second = norm_inputs(block.input_layernorm), norm_inputs(block.post_attention_layernorm)
        sizes = layer, config.num_attention_heads, config.num_kv_heads, config.kv_channels, attention.interleaved
        qkv = linear_inputs(attention.query_key_value)
        self.attend = KernelCall("attend_rows", (rows, config.query_size), (first, qkv), sizes)
        after_norm = (block.residual_after_norm,)
        self.project = KernelCall("project_rows", hidden, (first, linear_inputs(attention.dense)), after_norm)
        layers = linear_inputs(mlp.dense_h_to_4h), linear_inputs(mlp.dense_4h_to_h)
        self.mlp = KernelCall("mlp_rows", hidden, (second, *layers), after_norm)

    def construct(self, table: Tensor, x: Tensor, angles: Tensor) -> Tensor:
        """Table of the run, x [R, H], angles as of `KernelGLM` -> [R, H]."""
        x = self.project(table, self.attend(table, x, angles), x)
        return self.mlp(table, x)


class KernelGLM(nn.Cell):
    """The network over the rows of a run, whose table says where everything else is (`glm_ms.ops.cpu.rows`).

    Args:
        rows: R, most rows of a run.
    """

    def __init__(self, network: GLMNetwork, rows: int) -> None:
        super().__init__(auto_prefix=False)
        config, net = network.config, network.transformer
        self.rows = rows
        cos, sin = rotary_tables(config.seq_length, config.kv_channels, config.rope_ratio)
        pairs = slice(0, config.rotary_dim, 2)
        # Cosines and sines of the pairs of a head, [positions, 2, D / 4].
        self.angles = Tensor(np.ascontiguousarray(np.stack((cos[:, pairs], sin[:, pairs]), 1)))
        embedding = [net.embedding.embedding_table], [config.hidden_size]
        self.embed = KernelCall("embed_rows", (rows, config.hidden_size), (embedding,))
        self.blocks = nn.CellList([KernelBlock(network, layer, rows) for layer in range(config.num_layers)])
        output = norm_inputs(net.encoder.final_layernorm), linear_inputs(net.output_layer)
        self.output = KernelCall("output_rows", (1,), output, dtype=ms.int32)

    def construct(self, table: Tensor) -> Tensor:
        """Table of the run, int64 [R + 1, FIELDS] -> number of rows whose logits were written, int32 [1]."""
        x = self.embed(table)
        for block in self.blocks:
            x = block(table, x, self.angles)
        return self.output(table, x)
