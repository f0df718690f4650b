"""Quantizing a large weight: outputs some at a time, from any stored type, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glm_ms import GLMConfig
from glm_ms.convert.dtypes import bfloat16_to_float32
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.ops.packing import Packed, float32_to_bfloat16, pack_int4, pack_int8
from glm_ms.quant import Quantization, quantization
from glm_ms.quant.algorithms import quantize_int4, quantize_int8
from glm_ms.quant.network import _OUTPUTS, quantized_weight
from glm_ms.quant.writer import plan_quantization

WIDE = GLMConfig(
    num_layers=1, padded_vocab_size=16384, hidden_size=1024, ffn_hidden_size=64, kv_channels=64,
    num_attention_heads=16, multi_query_group_num=2, seq_length=32,
)  # fmt: skip


def whole(weight: np.ndarray, chosen: Quantization) -> Packed:
    if chosen.bits == 8:
        return pack_int8(*quantize_int8(weight))
    return pack_int4(*quantize_int4(weight, chosen.group), chosen.group)


@pytest.mark.parametrize("chosen", [quantization(8), quantization(4), quantization(4, 128)], ids=str)
@pytest.mark.parametrize("outputs", [1, _OUTPUTS, 2 * _OUTPUTS + 7])
def test_parts_make_the_whole(chosen: Quantization, outputs: int) -> None:
    rng = np.random.default_rng(outputs)
    weight = rng.normal(0, 0.1, (outputs, 70)).astype(np.float32)
    bits = float32_to_bfloat16(weight)
    for given, values in ((weight, weight), (bits, bfloat16_to_float32(bits))):
        found = quantized_weight("w", given, chosen)
        expected = whole(values, chosen)
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_array_equal(found.scale, expected.scale)
        assert found[2:] == expected[2:]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_memory_is_that_of_the_largest_packed_weight(dtype: str, tmp_path: Path) -> None:
    """Not that of the weight: it is mapped, and its integers are packed some at a time."""
    source, shapes, rng = tmp_path / "source", expected_shapes(WIDE), np.random.default_rng(0)
    names = {name.replace("embedding_table", "word_embeddings.weight"): shape for name, shape in shapes.items()}
    source.mkdir()
    values = (rng.normal(0, 0.02, shape).astype(np.float32) for shape in names.values())
    stored = (float32_to_bfloat16(value) if dtype == "bfloat16" else value.astype(np.float16) for value in values)
    write_safetensors(source / "model.safetensors", names, dtype, stored, {"format": "pt"})
    (source / "config.json").write_text(json.dumps(WIDE.to_hf_dict()))
    copy = plan_quantization(source, tmp_path / "int8", quantization(8))
    tracemalloc.start()
    try:
        copy.run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = WIDE.padded_vocab_size * WIDE.hidden_size
    print(f"{dtype}: {peak:,} bytes for a weight of {largest:,} values")
    assert peak < largest + 12e6
    found = load_file(tmp_path / "int8" / "model.safetensors")
    assert found["transformer.output_layer.quantized.weight"].nbytes == largest
