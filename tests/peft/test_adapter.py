"""Loading adapters: what is proven, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import slow_unless
from reference import FOLDER, fresh_golden_model, golden_model
from safetensors.numpy import load_file, save_file

from glm_ms import GLMForCausalLM, load_pretrained
from glm_ms.peft.adapter import AdapterError, attach, base_remark, read_adapter
from glm_ms.peft.lora import LoraConfig, check_complete
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.fingerprint import weights_fingerprint
from glm_ms.storage.integrity import describe_files, write_manifest_values

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


NEUTRAL = {
    "bias": "none", "use_dora": False, "rank_pattern": {}, "modules_to_save": None, "megatron_core": "megatron.core",
    "init_lora_weights": "gaussian", "layers_to_transform": [], "exclude_modules": None, "use_qalora": False,
    "qalora_group_size": 16, "inference_mode": False, "task_type": None, "a_key_of_the_future": None,
}  # fmt: skip


def test_every_other_value_of_a_config_is_used_or_refused(lora: Path) -> None:
    configure(lora, **NEUTRAL)
    assert read_adapter(lora).config == read_adapter(LORA).config


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": 4}, "r = 4"),
        ({"r": 8.5}, "r = 8.5: must be a positive whole number"),
        ({"r": "8"}, "r = '8'"),
        ({"r": True}, "r = True"),
        ({"r": None}, "r = None"),
        ({"use_dora": True}, "use_dora"),
        ({"use_dora": "false"}, "use_dora = 'false'"),
        ({"use_rslora": "false"}, "use_rslora = 'false': must be true or false"),
        ({"use_rslora": 0}, "use_rslora = 0"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"dense": 2}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_key_of_the_future": 1}, "a_key_of_the_future = 1: not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights = 1"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"lora_alpha": "32"}, "lora_alpha = '32'"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e29}, "at most 1e+06"),
        ({"lora_dropout": 1}, "lora_dropout = 1"),
        ({"target_modules": [1]}, "target_modules = [1]"),
        ({"target_modules": {"dense": 1}}, "target_modules"),
        ({"exclude_modules": 3}, "exclude_modules = 3"),
        ({"target_modules": f"a{{{'9' * 20}}}"}, "must be a regular expression"),
        ({"layers_to_transform": 0, "layers_pattern": ["("]}, "layers_pattern = ['(']"),
        ({"layers_to_transform": "1"}, "layers_to_transform = '1'"),
        ({"layers_to_transform": [0.0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ".*query_key_value", "layers_to_transform": [0]}, "layers_to_transform needs a list"),
        ({"r": 0}, "r = 0"),
    ],
)
def test_configs_that_cannot_be_used(lora: Path, values: dict, reason: str) -> None:
    configure(lora, **values)
    with pytest.raises(AdapterError, match=r"adapter_config\.json|adapter_model") as error:
        read_adapter(lora)
    assert reason in str(error.value)


QKV = [f"transformer.encoder.layers.{layer}.self_attention.query_key_value" for layer in range(2)]


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        ({}, [0, 1]),
        ({"target_modules": None}, [0, 1]),
        ({"target_modules": ["query_key_value", "q_proj"]}, [0, 1]),
        ({"target_modules": ".*query_key_value"}, [0, 1]),
        ({"target_modules": [".*query_key_value"]}, [0, 1]),  # as MindFormers writes it
        ({"target_modules": QKV}, [0, 1]),
        ({"target_modules": QKV[:1], "layers_to_transform": 1}, [0]),  # a full name counts for every layer
        ({"layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, [0]),
        ({"layers_to_transform": 0, "layers_pattern": ["(blocks)", "(lay)(ers)"]}, [0]),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks"]}, []),
        ({"layers_to_transform": [0], "layers_pattern": ["self_attention|layers"]}, []),
        ({"exclude_modules": ["layers.0.self_attention.query_key_value"]}, [1]),
        ({"exclude_modules": r".*layers\.1\..*"}, [0]),
    ],
)
def test_an_adapter_has_the_tensors_that_its_config_promises(lora: Path, values: dict, layers: list[int]) -> None:
    """As many as `peft` would make, no more and no less."""
    configure(lora, **{"target_modules": ["query_key_value"], **values})
    names = golden_model("glm2_tiny").network.linears()
    for present in ([0], [1], [0, 1]):
        shutil.copy(LORA / "adapter_model.safetensors", lora)
        gone = [layer for layer in (0, 1) if layer not in present]
        change(lora, lambda t, gone=gone: [t.pop(n) for n in list(t) for i in gone if f"layers.{i}." in n])
        if present == layers:
            check_complete(read_adapter(lora), names)
            continue
        with pytest.raises(AdapterError) as error:
            check_complete(read_adapter(lora), names)
        for layer in {*present} ^ {*layers}:
            assert f"layers.{layer}.self_attention.query_key_value" in str(error.value)


def test_targets_beyond_linear_layers(lora: Path) -> None:
    configure(lora, target_modules=["query_key_value", "word_embeddings"])
    assert r"word_embeddings.lora_A.weight: missing" in refused(lora)
    configure(lora, target_modules="(")
    assert "target_modules = '(': must be a regular expression" in refused(lora)


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
    with pytest.raises(AdapterError, match="no adapter: contains the weights of a network"):
        read_adapter(FOLDER / "glm2_tiny")


@pytest.mark.slow
def test_another_base_is_remarked_on(lora: Path, tmp_path: Path) -> None:
    base, other = FOLDER / "glm2_tiny", tmp_path / "other"
    assert base_remark(lora, base) == ""  # nothing tells its base
    position = {"base_weights": weights_fingerprint(base)}
    write_manifest_values(lora, {"format_version": 1, "position": position, "files": describe_files(lora)})
    assert base_remark(lora, base) == ""
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.output_layer.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    assert base_remark(lora, other).startswith(f"note: {lora} was trained on other weights than {other}")
    with pytest.warns(UserWarning, match="was trained on other weights"):
        load_pretrained(other, adapter=lora)


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
    with pytest.raises(ValueError, match=r"contains an adapter, not weights; .* this as adapter$"):
        load_pretrained(tmp_path)


def test_a_prefix_for_another_base() -> None:
    assert "another base" in refused(PREFIX, "glm3_tiny")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"pre_seq_len": 9}, "pre_seq_len is 8, but the config.json beside it says 9"),
        ({"prefix_projection": False}, "prefix_projection is True, but the config.json beside it says False"),
        ({"rope_ratio": 50}, "made for another base: config.json beside it has rope_ratio: 50, in this network 1.0"),
        ({"quantization_bit": 4, "torch_dtype": "float16", "seq_length": 5}, ""),  # of the base while training
    ],
)
def test_the_config_beside_a_prefix_is_read(tmp_path: Path, values: dict, reason: str) -> None:
    shutil.copy(PREFIX, tmp_path / "prefix_encoder.safetensors")
    config = json.loads((FOLDER / "glm2_tiny" / "config.json").read_text())
    own = {"pre_seq_len": 8, "prefix_projection": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own, **values}))
    network = fresh_golden_model("glm2_tiny").network
    with pytest.raises(AdapterError, match=reason) if reason else nullcontext():
        stored = read_adapter(tmp_path)
        attach(network, stored.config, 0, stored)
    assert (network.transformer.prefix_encoder is None) == bool(reason)


def test_a_prefix_of_odd_shapes(tmp_path: Path) -> None:
    for name in ("embedding.weight", "trans.0.weight"):
        for shape in ((), (3,), (0, 4)):
            tensors = {**load_file(PREFIX), f"transformer.prefix_encoder.{name}": np.zeros(shape, np.float32)}
            save_file(tensors, tmp_path / "prefix_encoder.safetensors")
            with pytest.raises(AdapterError, match=rf"has no transformer\.prefix_encoder\.{name} "):
                read_adapter(tmp_path)


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
