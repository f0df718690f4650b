"""`GLMForCausalLM.kv_cache`: the type of keys and values at every door that generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference import fresh_golden_model

from glm_ms import GLMForCausalLM, load_pretrained
from glm_ms.generation.graph_choice import StorageError
from glm_ms.ops.cpu import library

PROMPT = list(range(5, 40))
SMALLER = ("bfloat16", "int8")


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if library.reason():
        pytest.skip(f"no C++ kernels: {library.reason()}")


@pytest.fixture
def model() -> GLMForCausalLM:
    return fresh_golden_model("glm3_tiny")


def page_bytes(model: GLMForCausalLM) -> int:
    """Bytes of the pages of a decoder of this model."""
    decoder = model._decoders.decoder(1, 64)
    decoder.serve()
    return decoder.memory.bytes.nbytes


def chosen_scores(model: GLMForCausalLM) -> np.ndarray:
    """Logits after the prompt and one more token, which read stored keys and values."""
    decoder = model._decoders.decoder(1, 64)
    slot = decoder.open(PROMPT)
    while not decoder.ready(slot):
        decoder.prefill(slot)
    return decoder.step([slot], np.array([7], np.int32))[0]


def test_a_smaller_type_takes_less_memory_and_changes_the_scores_little(model: GLMForCausalLM) -> None:
    assert model.kv_cache is None
    exact, size = chosen_scores(model), page_bytes(model)
    model.kv_cache = "float32"
    assert (chosen_scores(model).tobytes(), page_bytes(model)) == (exact.tobytes(), size)
    sizes = []
    for storage in SMALLER:
        model.kv_cache = storage
        error = np.abs(chosen_scores(model) - exact).max() / np.abs(exact).max()
        print(f"{storage}: largest error {error:.2g} of the largest logit")
        assert 0 < error < 0.05
        sizes.append(page_bytes(model))
    assert size > sizes[0] > sizes[1]
    model.kv_cache = None
    assert chosen_scores(model).tobytes() == exact.tobytes()


def test_it_stays_when_the_weights_are_quantized(model: GLMForCausalLM) -> None:
    model.kv_cache = "int8"
    size = page_bytes(model)
    assert page_bytes(model.quantize(8)) == size
    assert model.kv_cache == "int8"
    model.generate(PROMPT, max_new_tokens=2)


def test_what_is_refused(model: GLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="kv_cache=int4: must be one of float32, bfloat16, int8"):
        model.kv_cache = "int4"
    monkeypatch.setenv("GLM_MS_CPU_KERNELS", "0")
    with pytest.raises(StorageError, match=r"kv_cache=int8: needs the C\+\+ kernels .*: GLM_MS_CPU_KERNELS=0; or"):
        model.kv_cache = "int8"
    assert model.kv_cache is None
    model.generate(PROMPT, max_new_tokens=1)


def test_a_model_of_a_file_has_it(golden: Path) -> None:
    assert load_pretrained(golden / "models" / "glm3_tiny", kv_cache="int8").kv_cache == "int8"
