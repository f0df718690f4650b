"""Run by the rig: compiles networks of one and two layers for the Ascend target, prints the operators of a layer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import mindspore as ms
import numpy as np
import rig
from graph_ir import compiled_operators, of_a_layer
from mindspore import Tensor, nn, ops

from glm_ms.generation.pages import PAGE
from glm_ms.model.cache import BlockCache, PagedGLM
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.registry import fuse_kernels
from glm_ms.quant import Quantization
from glm_ms.quant.network import quantize_network

BATCH, LENGTH = 2, 6
SIZES = {
    "padded_vocab_size": 64, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4,
    "multi_query_group_num": 2, "seq_length": 32
}  # fmt: skip


class Gradients(nn.Cell):
    """Logits and the gradients of all weights."""

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.gradients = ops.value_and_grad(self.network, None, ms.ParameterTuple(network.trainable_params()))

    def construct(self, *inputs: Tensor) -> tuple:
        return self.gradients(*inputs)


def training(network: GLMNetwork) -> tuple[nn.Cell, list[Tensor | None]]:
    ids = Tensor(np.ones((BATCH, LENGTH), np.int32))
    return Gradients(network), [ids, ids, ids, Tensor(np.arange(LENGTH, dtype=np.int32))]


def paged(network: GLMNetwork, batch: int, length: int, last: int | None) -> tuple[nn.Cell, list[Tensor | None]]:
    cache = BlockCache(network.config, 6, PAGE)
    tokens, pages = np.ones((batch, length), np.int32), np.full((batch, 2), 2, np.int32)
    arrays = [
        tokens, tokens, tokens, np.zeros(batch, np.int32), cache.page_rows(pages[:, :1] + 0 * tokens, 0 * tokens),
        cache.page_blocks(pages), None, None if last is None else np.array([last], np.int32)
    ]  # fmt: skip
    cell = PagedGLM(network, cache, 2 * PAGE)
    return cell, [None if array is None else Tensor(array.astype(np.int32)) for array in arrays]


def step(network: GLMNetwork) -> tuple[nn.Cell, list[Tensor | None]]:
    return paged(network, BATCH, 1, None)


def prefill(network: GLMNetwork) -> tuple[nn.Cell, list[Tensor | None]]:
    return paged(network, 1, PAGE, 3)


rig.start()
alive = []  # the graph parser knows cells by their address
for weights, quantization in (
    ("float32", None), ("float16", None), ("int8", Quantization(8)), ("int4", Quantization(4, 32))
):  # fmt: skip
    for build in (step, prefill, training) if quantization is None else (step,):
        counts: list[Counter[str]] = []
        for layers in (1, 2):
            kind = "float16" if quantization else weights
            config = GLMConfig(num_layers=layers, compute_dtype="float16", param_init_type=kind, **SIZES)
            network = GLMNetwork(config)
            if quantization is not None:
                quantize_network(network, quantization)
            fuse_kernels(network, ms.float16)
            cell, inputs = build(network)
            folder = Path("graphs").resolve() / f"{weights}_{build.__name__}_{layers}"
            ms.set_context(save_graphs=2, save_graphs_path=str(folder))
            cell.compile(*inputs)
            alive.append(cell)
            counts.append(compiled_operators(folder))
        found = of_a_layer(*counts)
        print("LAYER", json.dumps([weights, build.__name__, found]), flush=True)
rig.done()
