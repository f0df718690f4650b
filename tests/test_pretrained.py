"""`load_pretrained`: every kind of checkpoint gives the same network, bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import CASES, FOLDER, golden_numbers, golden_weights
from tolerances import LOGITS

from glm_ms import GLMConfig, GLMForCausalLM, load_pretrained
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.reader import open_checkpoint
from glm_ms.model.config import ConfigError
from glm_ms.ops.cpu.library import SWITCH
from glm_ms.peft.adapter import AdapterError, read_adapter
from glm_ms.pretrained import find_tokenizer, load_with_tokenizer
from glm_ms.settings import SettingsError, load_settings
from glm_ms.storage.errors import CheckpointError
from glm_ms.tokenizer import VocabularyError

CASE = "glm2_tiny"


def check_network(path: Path, case: str = CASE, config: object = None) -> None:
    """Compares with a network of the golden weights, whose numbers tests/model compares with the reference."""
    model = load_pretrained(path, config=config)
    assert model.config == GLMConfig.from_pretrained(FOLDER / case)
    check_parameters(model, golden_weights(case))


def check_parameters(model: GLMForCausalLM, weights: dict[str, np.ndarray]) -> None:
    """Equal in type, and bit for bit."""
    parameters = model.parameters()
    assert set(parameters) == set(weights)
    for name, value in weights.items():
        assert parameters[name].asnumpy().dtype == value.dtype
        np.testing.assert_array_equal(parameters[name].asnumpy(), value, name)


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_folder(case: str) -> None:
    check_network(FOLDER / case, case)


def test_logits_of_a_loaded_network() -> None:
    numbers = golden_numbers(CASE)
    logits = load_pretrained(FOLDER / CASE)(numbers["input_ids"], numbers["attention_mask"]).asnumpy()
    np.testing.assert_allclose(logits, numbers["logits"], **LOGITS)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_weights_are_the_memory_of_their_file(dtype: str, tmp_path: Path) -> None:
    """And stay so when nothing but the model refers to them."""
    folder = tmp_path / "copy"
    plan_conversion(FOLDER / CASE, folder, dtype=dtype).run()
    model = load_pretrained(folder)
    gc.collect()
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    places = [tuple(int(end, 16) for end in span[0].split("-")) for span in spans if str(folder) in span[-1]]
    parameters = list(model.parameters().values())
    assert all(any(first <= one.data_ptr() < last for first, last in places) for one in parameters)
    given = golden_weights(CASE)
    for name, parameter in model.parameters().items():
        found = parameter.astype(ms.float32).asnumpy()
        np.testing.assert_array_equal(found, Tensor(given[name], parameter.dtype).astype(ms.float32).asnumpy(), name)


def test_sharded_bin() -> None:
    pytest.importorskip("torch")
    check_network(FOLDER / CASE / "sharded")


@pytest.mark.parametrize("kernels", [True, False])
def test_half_precision_shards(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes in float32; only its kernels read float16."""
    pytest.importorskip("torch")
    if not kernels:
        monkeypatch.setenv(SWITCH, "0")
    model = load_pretrained(FOLDER / "glm3_tiny" / "sharded_fp16")
    assert (model.config.param_init_type, model.config.compute_dtype) == (
        "float16" if kernels else "float32",
        "float32",
    )
    rounded = {name: w.astype(np.float16) for name, w in golden_weights("glm3_tiny").items()}
    stored = rounded if kernels else {name: w.astype(np.float32) for name, w in rounded.items()}
    check_parameters(model, stored)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_give_the_numbers_of_float32(dtype: str, tmp_path: Path) -> None:
    """The same bits, also when they are quantized; in half the memory."""
    plan_conversion(FOLDER / CASE, tmp_path / dtype, dtype=dtype).run()
    plan_conversion(tmp_path / dtype, tmp_path / "float32", dtype="float32").run()
    half, whole = (load_pretrained(tmp_path / name) for name in (dtype, "float32"))
    types = {name: str(parameter.dtype).lower() for name, parameter in half.parameters().items()}
    assert set(types.values()) == {dtype}
    ids = list(range(5, 25))
    for change in (lambda model: None, lambda model: model.quantize(8)):
        for model in (half, whole):
            change(model)
        answers = [model.generate(ids, max_new_tokens=12) for model in (half, whole)]
        np.testing.assert_array_equal(*answers)
        np.testing.assert_array_equal(half([ids]).asnumpy(), whole([ids]).asnumpy())


def test_a_config_of_16_bits_takes_the_type_of_the_file() -> None:
    """Configs name bfloat16 for float16 releases too, as cards compute in it."""
    pytest.importorskip("torch")
    folder = FOLDER / "glm3_tiny" / "sharded_fp16"
    config = dataclasses.replace(GLMConfig.from_pretrained(folder), param_init_type="bfloat16")
    assert load_pretrained(folder, config).config.param_init_type == "float16"


def test_an_alpha_without_an_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"lora_alpha=16: .*glm2_tiny has no adapter"):
        load_pretrained(FOLDER / CASE, lora_alpha=16)


def test_weights_of_another_type_than_the_config_says_stay_exact(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / CASE, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch_dtype": "float16"}))
    check_parameters(load_pretrained(tmp_path / "copy"), golden_weights(CASE))


def test_mindspore_ckpt_of_mindspore_itself(tmp_path: Path) -> None:
    entries = [{"name": name, "data": Tensor(value)} for name, value in golden_weights(CASE).items()]
    ms.save_checkpoint(entries, str(tmp_path / "glm.ckpt"))
    check_network(tmp_path / "glm.ckpt", config=FOLDER / CASE)
    check_network(tmp_path / "glm.ckpt", config=GLMConfig.from_pretrained(FOLDER / CASE))


def test_embedding_name_of_newer_mindformers(tmp_path: Path) -> None:
    weights = golden_weights(CASE)
    weights["transformer.embedding.embedding_weight"] = weights.pop("transformer.embedding.embedding_table")
    entries = [{"name": name, "data": Tensor(value)} for name, value in weights.items()]
    ms.save_checkpoint(entries, str(tmp_path / "glm.ckpt"))
    check_network(tmp_path / "glm.ckpt", config=FOLDER / CASE / "config.json")


def test_single_file_needs_a_config(tmp_path: Path) -> None:
    shutil.copy(FOLDER / CASE / "model.safetensors", tmp_path / "glm.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(tmp_path / "glm.safetensors")
    check_network(tmp_path / "glm.safetensors", config=FOLDER / CASE)


def test_tokenizer_of_the_weights_or_of_their_run(tmp_path: Path, vocab_file: Path) -> None:
    step = tmp_path / "run" / "checkpoint" / "step_00000001"
    shutil.copytree(FOLDER / "glm3_tiny", step)
    settings = {"processor": {"tokenizer": {"type": "ChatGLM3Tokenizer", "vocab_file": str(vocab_file)}}}
    (tmp_path / "run" / "settings.yaml").write_text(json.dumps(settings))
    for path in (tmp_path / "run", step):
        with pytest.raises(CheckpointError, match="give the tokenizer of these weights"):  # it has 64798 ids
            load_with_tokenizer(path)
    with pytest.raises(VocabularyError, match=r"no tokenizer\.model here"):
        load_with_tokenizer(FOLDER / "glm3_tiny")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_with_tokenizer(tmp_path / "run", tokenizer=tmp_path / "nothing")


@pytest.mark.parametrize("path", [5, None, b"folder", ["a"], "a\0b"])
def test_what_cannot_be_a_path(path: Any) -> None:
    words = "NUL" if isinstance(path, str) else "a path must be a text or a pathlib.Path"
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(path)
    with pytest.raises(VocabularyError, match=words):
        find_tokenizer(path)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=words):
        plan_conversion(FOLDER / CASE, path)
    with pytest.raises(SettingsError, match=words):
        load_settings(path)
    if path is not None:
        with pytest.raises(ConfigError, match=words):
            load_pretrained(FOLDER / CASE, config=path)


def test_missing_path() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_pretrained("nowhere/at/all")


def test_checkpoint_of_another_model_lists_what_does_not_fit(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / CASE, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.update(num_layers=3, ffn_hidden_size=100)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_pretrained(tmp_path / "model")
    assert "transformer.encoder.layers.2." in str(error.value)
    assert "[352, 64]" in str(error.value)
    assert "[200, 64]" in str(error.value)
