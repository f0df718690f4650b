"""The memory of a server as planned and as it is."""

from __future__ import annotations

import dataclasses
import math

import pytest
from mindspore.nn.utils import no_init_parameters

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.generation.kernel_graphs import KernelGraphs
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.model.glm import GLMNetwork
from glm_ms.ops.cpu import library
from glm_ms.peft.rows import AdapterBounds
from glm_ms.plan.serving import plan_serving
from glm_ms.quant import Quantization, quantization
from glm_ms.quant.network import cells_for

TINY = GLMConfig(
    num_layers=2, padded_vocab_size=96, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
    multi_query_group_num=2, seq_length=256
)  # fmt: skip


@pytest.mark.parametrize(
    "bounds",
    [
        AdapterBounds(),
        AdapterBounds(3, 4, max_prefix=20),
        AdapterBounds(2, 8, ("transformer.encoder.layers.1.self_attention.query_key_value",)),
    ],
)
def test_tables_are_those_of_a_decoder(bounds: AdapterBounds) -> None:
    config = dataclasses.replace(TINY, param_init_type="float32", compute_dtype="float32")
    network = GLMForCausalLM(config).network
    weights = sum(parameter.nbytes for parameter in network.get_parameters())
    graphs = PagedGraphs(network, 3, 100, 32, bounds)
    found = plan_serving(config, 3, 100, bounds)
    assert found.weights == weights
    assert found.kv_cache == sum(table.nbytes for table in graphs.cache.tables)
    assert found.adapters == sum(parameter.nbytes for parameter in network.get_parameters()) - weights
    assert found.kv_cache % found.page == 0


@pytest.mark.parametrize("kv_cache", ["float32", "bfloat16", "int8"])
def test_pages_of_the_kernels_are_those_of_a_decoder(kv_cache: str) -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")
    network, bounds = GLMForCausalLM(TINY).network, AdapterBounds(3, 4, max_prefix=20)
    decoder = PagedDecoder(KernelGraphs(network, 3, 100, 32, bounds, storage=kv_cache))
    decoder.serve()
    found = plan_serving(TINY, 3, 100, bounds, kv_cache=kv_cache)
    assert found.kv_cache == decoder.memory.bytes.nbytes
    assert found.kv_cache % found.page == 0


def test_scores_are_counted_unless_a_kernel_keeps_none() -> None:
    half = dataclasses.replace(GLMConfig(), param_init_type="float16", compute_dtype="float16")
    portable, fused = (plan_serving(half, 16, 4096, AdapterBounds(), kept) for kept in (False, True))
    assert portable.activations - fused.activations > 0
    assert portable.total - portable.activations == fused.total - fused.activations


def test_six_billion_parameters() -> None:
    """28 layers x keys and values x 2 groups x 128 channels x 2 bytes = 28 KiB a token."""
    config = dataclasses.replace(GLMConfig(), seq_length=8192, param_init_type="float16", compute_dtype="float16")
    found = plan_serving(config, 8, 2048, AdapterBounds())
    assert found.page == 16 * 28 * 1024
    assert found.kv_cache == (8 * 128 + 2) * found.page
    assert found.weights == 2 * 6_243_584_000


@pytest.mark.parametrize(
    "chosen", [quantization(8), quantization(4, 64), Quantization(4, 128, output_layer=False, embedding="float16")]
)
def test_weights_are_those_of_a_quantized_network(chosen: Quantization) -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4}
    config = GLMConfig(**sizes, padded_vocab_size=320)
    with no_init_parameters():
        network = GLMNetwork(config, cells_for(chosen))
    parameters = list(network.get_parameters())
    expected = sum(math.prod(parameter.shape) * parameter.itemsize for parameter in parameters)
    plan = plan_serving(config, 2, 64, AdapterBounds(), quantization=chosen)
    assert plan.weights == expected
    assert plan.weights < plan_serving(config, 2, 64, AdapterBounds()).weights


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_of_16_bits_on_the_kernels(stored: str) -> None:
    config = dataclasses.replace(TINY, param_init_type=stored, compute_dtype="float32")
    expected = sum(math.prod(p.shape) * p.itemsize for p in GLMNetwork(config).get_parameters())
    assert plan_serving(config, 2, 64, AdapterBounds(), kv_cache="float32").weights == expected
