"""Names and shapes against the golden checkpoints and the index of the released 6B."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glm_ms import GLMConfig
from glm_ms.convert.names import (
    INV_FREQ,
    expected_shapes,
    inverse_frequencies,
    is_training_state,
    to_glm_name,
    to_hf_name,
)

CASES = (
    "glm2_tiny", "glm3_tiny", "glm3_32k_tiny", "glm2_mha", "glm2_no_final_norm", "glm2_res_post_ln",
    "glm2_bias_layernorm",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_expected_shapes_are_those_of_the_reference(golden: Path, case: str) -> None:
    folder = golden / "models" / case
    stored = {name: array.shape for name, array in load_file(folder / "model.safetensors").items()}
    del stored[INV_FREQ]
    config = GLMConfig.from_pretrained(folder)
    shapes = expected_shapes(config)
    assert {to_hf_name(name, config): shape for name, shape in shapes.items()} == stored


@pytest.mark.parametrize("case", CASES)
def test_inverse_frequencies_are_bitwise_those_of_the_reference(golden: Path, case: str) -> None:
    folder = golden / "models" / case
    stored = load_file(folder / "model.safetensors")[INV_FREQ]
    np.testing.assert_array_equal(inverse_frequencies(GLMConfig.from_pretrained(folder)), stored, strict=True)


def test_real_size_names_and_bytes_are_those_of_the_release(chatglm_folder: Path) -> None:
    config = GLMConfig.from_pretrained(chatglm_folder / "config_glm3_6b.json")
    index = json.loads((chatglm_folder / "glm3_6b.pytorch_model.bin.index.json").read_text())
    shapes = expected_shapes(config)
    assert {to_hf_name(name, config) for name in shapes} | {INV_FREQ} == set(index["weight_map"])
    elements = sum(math.prod(shape) for shape in shapes.values()) + inverse_frequencies(config).size
    assert 2 * elements == index["metadata"]["total_size"]  # float16


def test_glm2_and_glm3_have_the_same_parameters(chatglm_folder: Path) -> None:
    glm2, glm3 = (
        expected_shapes(GLMConfig.from_pretrained(chatglm_folder / f"config_{name}_6b.json"))
        for name in ("glm2", "glm3")
    )
    assert glm2 == glm3


def test_names_are_those_of_the_released_ckpt() -> None:
    names = expected_shapes(GLMConfig(num_layers=1))
    assert "transformer.embedding.embedding_table" in names
    assert "transformer.encoder.layers.0.self_attention.query_key_value.weight" in names
    assert "transformer.output_layer.weight" in names


def test_every_name_survives_the_way_to_hugging_face_and_back() -> None:
    config = GLMConfig(num_layers=2, add_bias_linear=True, rmsnorm=False)
    names = expected_shapes(config)
    hf_names = [to_hf_name(name, config) for name in names]
    assert "transformer.embedding.word_embeddings.weight" in hf_names
    assert [to_glm_name(name) for name in hf_names] == list(names)


def test_newer_mindformers_embedding_is_understood() -> None:
    expected = "transformer.embedding.embedding_table"
    assert to_glm_name("transformer.embedding.embedding_weight") == expected


@pytest.mark.parametrize("name", ["adam_m.transformer.output_layer.weight", "global_step", "moments.x"])
def test_training_state_is_told_from_weights(name: str) -> None:
    assert is_training_state(name)


def test_no_weight_passes_for_training_state() -> None:
    names = expected_shapes(GLMConfig(num_layers=1, add_bias_linear=True, rmsnorm=False))
    assert not any(is_training_state(name) for name in names)
    assert not is_training_state("adam_mother.weight")


def test_conversion_imports_no_framework(repository: Path) -> None:
    code = (
        "import sys; import glm_ms.convert.conversion; "
        "print([name for name in ('mindspore', 'mindformers', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
