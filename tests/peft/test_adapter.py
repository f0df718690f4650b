"""Loading adapters: what is proven, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import slow_unless
from reference import FOLDER, fresh_golden_model, golden_model
from safetensors.numpy import load_file, save_file

from glm_ms import GLMForCausalLM, load_pretrained
from glm_ms.peft.adapter import AdapterError, read_adapter
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.storage.errors import CheckpointError

LORA = FOLDER.parent / "train" / "lora" / "final"
PREFIX = FOLDER.parent / "train" / "ptuning_v2_proj" / "final.safetensors"
IDS = np.random.default_rng(3).integers(0, 512, (2, 20))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA adapter for glm2_tiny, to be spoilt."""
    folder = tmp_path / "lora"
    shutil.copytree(LORA, folder)
    return folder


def change(folder: Path, edit) -> None:
    """Edits the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def configure(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@cache
def refusing_model(case: str) -> GLMForCausalLM:
    """One for all refused adapters: each leaves it as it was."""
    return fresh_golden_model(case)


def parts(model: GLMForCausalLM) -> list[tuple[str, type]]:
    return [(name, type(cell)) for name, cell in model.network.cells_and_names()]


def refused(path: Path, case: str = "glm2_tiny") -> str:
    """What loading says; the model is as before."""
    model = refusing_model(case)
    with pytest.raises(AdapterError) as error:
        model.load_adapter(path)
    assert str(path) in str(error.value)
    assert model.adapter is None
    assert parts(model) == parts(golden_model(case))
    np.testing.assert_array_equal(model(IDS).asnumpy(), golden_model(case)(IDS).asnumpy())
    return str(error.value)


def test_the_report_tells_the_truth(lora: Path) -> None:
    model = fresh_golden_model("glm2_tiny")
    report = model.load_adapter(lora)
    tensors = load_file(lora / "adapter_model.safetensors")
    assert report.tensors == len(tensors) == 4
    assert report.parameters == sum(t.size for t in tensors.values())
    assert report.norm == pytest.approx(np.sqrt(sum((t.astype(float) ** 2).sum() for t in tensors.values())))
    probe = np.linspace(0, 511, 16).astype(int)
    change = np.abs(model(probe).asnumpy() - golden_model("glm2_tiny")(probe).asnumpy()).max()
    assert report.logit_change == pytest.approx(change, rel=1e-5)
    assert "4 of 4 tensors matched" in str(report)
    assert np.abs(model(IDS).asnumpy() - golden_model("glm2_tiny")(IDS).asnumpy()).max() > 0.1


def test_one_that_changes_nothing(lora: Path) -> None:
    change(lora, lambda tensors: [t.fill(0) for name, t in tensors.items() if "lora_B" in name])
    assert "changes nothing" in refused(lora)


def test_an_empty_one(lora: Path) -> None:
    change(lora, lambda tensors: tensors.clear())
    assert "is empty" in refused(lora)


def test_one_for_another_base(lora: Path) -> None:
    assert "another base" in refused(lora, "glm3_tiny")
    path = lora / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(path).items()}, path)
    message = refused(lora)
    assert "another base" in message
    assert "layers.7" in message


def test_half_a_pair_a_stranger_and_numbers_that_are_none(lora: Path) -> None:
    name = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_B.weight"
    original = load_file(lora / "adapter_model.safetensors")
    change(lora, lambda tensors: tensors.pop(name))
    assert "layers.0.self_attention.query_key_value.lora_B.weight: missing" in refused(lora)
    save_file({**original, "base_model.model.lm_head.weight": original[name]}, lora / "adapter_model.safetensors")
    assert "lm_head" in refused(lora)
    save_file({**original, name: original[name] * np.float32(np.nan)}, lora / "adapter_model.safetensors")
    assert "NaN" in refused(lora)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": 4}, "r = 4"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"r": 0}, "r = 0"),
    ],
)
def test_configs_that_cannot_be_used(lora: Path, values: dict, reason: str) -> None:
    configure(lora, **values)
    with pytest.raises(AdapterError, match=r"adapter_config\.json|adapter_model") as error:
        read_adapter(lora)
    assert reason in str(error.value)


def test_files_that_are_missing_or_broken(lora: Path, tmp_path: Path) -> None:
    os.truncate(lora / "adapter_model.safetensors", 5000)
    assert "truncated" in refused(lora)
    (lora / "adapter_config.json").write_text("{")
    shutil.copy(LORA / "adapter_model.safetensors", lora)
    assert "adapter_config.json" in refused(lora)
    (lora / "adapter_config.json").unlink()
    assert "the scale of the adapter is not known" in refused(lora)
    (lora / "adapter_model.safetensors").unlink()
    assert "contains no adapter" in refused(lora)
    assert "no such file" in refused(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="no adapter: contains transformer"):
        read_adapter(FOLDER / "glm2_tiny")


@pytest.mark.slow
def test_an_official_prefix_checkpoint(tmp_path: Path) -> None:
    """As the original P-Tuning code leaves it: a pickle of the encoder alone beside the config."""
    torch = pytest.importorskip("torch")
    tensors = load_file(PREFIX)
    torch.save({name: torch.tensor(t).half() for name, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    config = json.loads((FOLDER / "glm2_tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pre_seq_len": 8, "prefix_projection": True}))
    model = fresh_golden_model("glm2_tiny")
    report = model.load_adapter(tmp_path)
    assert report.tensors == 5
    reference = fresh_golden_model("glm2_tiny")
    reference.load_adapter(PREFIX)
    np.testing.assert_allclose(model(IDS).asnumpy(), reference(IDS).asnumpy(), atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="--load_adapter"):
        load_pretrained(tmp_path)


def test_a_prefix_for_another_base() -> None:
    assert "another base" in refused(PREFIX, "glm3_tiny")


PROJECTED, LOW_RANK = PrefixConfig(4, True, 24), LoraConfig(2, 4.0)


@pytest.mark.parametrize("config", slow_unless([PROJECTED], [PrefixConfig(4), PROJECTED, LOW_RANK]))
def test_what_is_saved_is_loaded_and_restored(config, tmp_path: Path) -> None:
    model = fresh_golden_model("glm3_tiny")
    adapter = model.add_adapter(config, seed=3)
    values = {p.name: np.random.default_rng(1).normal(size=p.shape).astype(np.float32) for p in adapter.parameters()}
    adapter.assign(values, tmp_path)
    adapter.save(tmp_path)
    loaded = load_pretrained(FOLDER / "glm3_tiny", adapter=tmp_path)
    np.testing.assert_array_equal(loaded(IDS).asnumpy(), model(IDS).asnumpy())
    fresh = fresh_golden_model("glm3_tiny")
    fresh.add_adapter(config, seed=9).restore(tmp_path)
    np.testing.assert_array_equal(fresh(IDS).asnumpy(), model(IDS).asnumpy())
    with pytest.raises(CheckpointError, match="an adapter, not weights"):
        load_pretrained(tmp_path, FOLDER / "glm3_tiny")
