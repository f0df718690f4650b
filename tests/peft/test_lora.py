"""LoRA: which modules, frozen bases, saving, merging."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import load_script
from reference import FOLDER, fresh_golden_model, golden_model, golden_weights
from safetensors.numpy import load_file, save_file

from glm_ms import GLMConfig, load_pretrained
from glm_ms.generation import GLMForCausalLM
from glm_ms.peft.adapter import AdapterError, read_adapter
from glm_ms.peft.lora import LoraConfig, lora_deltas, promised_modules, target_names
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.storage.integrity import describe_files, write_manifest_values

IDS = np.random.default_rng(3).integers(0, 512, (2, 20))
NAMES = [
    f"transformer.encoder.layers.{i}.{name}"
    for i in range(2)
    for name in (
        "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
    )
] + ["transformer.output_layer"]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "endings"),
    [
        (".*query_key_value", {"query_key_value"}),
        (".*query_key_value*", {"query_key_value"}),  # as MindFormers' files write it
        (["query_key_value"], {"query_key_value"}),
        (["self_attention.dense"], {"dense"}),
        (["dense", "dense_4h_to_h"], {"dense", "dense_4h_to_h"}),
        (r".*\.mlp\..*", {"dense_h_to_4h", "dense_4h_to_h"}),
        (".*", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"}),
    ],
)
def test_targets(targets, endings: set[str]) -> None:
    found = target_names(targets, NAMES)
    assert {name.rpartition(".")[2] for name in found} == endings
    assert found == sorted(found, key=NAMES.index)
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else tuple(targets))
    assert promised_modules(config, NAMES) == found  # what is trained here can be read again


@pytest.mark.parametrize(
    "targets", ["query_key_value", ".*wq", ["qkv"], ["query_key_value", "densee"], [""], "(", "a{99999999999999999999}"]
)
def test_targets_that_match_nothing(targets) -> None:
    with pytest.raises(AdapterError, match="target_modules") as error:
        target_names(targets, NAMES)
    if "not a regular expression" not in str(error.value):
        assert "transformer.encoder.layers.N.self_attention.query_key_value" in str(error.value)
        assert "transformer.output_layer" in str(error.value)


def test_a_target_given_twice_is_named_once() -> None:
    with pytest.raises(AdapterError, match="target_modules: 'qkv' matches"):
        target_names(["qkv", "dense", "qkv"], NAMES)


def trained(model: GLMForCausalLM, config: LoraConfig, seed: int = 4, size: float = 0.2) -> GLMForCausalLM:
    """With an adapter of random values of a standard deviation `size`."""
    adapter, draw = model.add_adapter(config, seed), np.random.default_rng(seed)
    values = {p.name: draw.normal(0, size, p.shape).astype(np.float32) for p in adapter.parameters()}
    adapter.assign(values, Path("drawn"))
    return model


def test_a_new_adapter_changes_nothing_and_alone_is_trained() -> None:
    model = fresh_golden_model("glm2_tiny")
    before, names = model(IDS).asnumpy(), list(model.parameters())
    adapter = model.add_adapter(LoraConfig(target_modules=("query_key_value", "dense")), seed=1)
    assert np.array_equal(model(IDS).asnumpy(), before)
    assert {id(p) for p in model.network.trainable_params()} == {id(p) for p in adapter.parameters()}
    assert list(model.parameters()) == names
    assert {str(p.dtype) for p in adapter.parameters()} == {"Float32"}
    again = fresh_golden_model("glm2_tiny").add_adapter(LoraConfig(target_modules=("query_key_value", "dense")), seed=1)
    for one, other in zip(adapter.parameters(), again.parameters()):
        assert np.array_equal(one.asnumpy(), other.asnumpy())
    with pytest.raises(AdapterError, match="has an adapter already"):
        model.add_adapter(PrefixConfig(4))


@pytest.mark.slow
def test_adapters_act_in_graphs_compiled_before() -> None:
    """A model that has been used must not go on with the graphs of its base."""
    model = fresh_golden_model("glm2_tiny")
    prompt = IDS[0].tolist()
    before = (
        model(IDS).asnumpy(),
        float(model(IDS, labels=IDS).asnumpy()),
        model.generate(prompt, max_new_tokens=8),
    )
    trained(model, LoraConfig(4, 8.0, 0.0))
    assert np.abs(model(IDS).asnumpy() - before[0]).max() > 0.1
    assert abs(float(model(IDS, labels=IDS).asnumpy()) - before[1]) > 1e-3
    sequence = model.generate(prompt, max_new_tokens=8, eos_token_id=[])
    assert sequence != before[2]
    for length in range(len(prompt), len(sequence[0])):
        assert int(model(sequence[0][:length]).asnumpy()[0, -1].argmax()) == sequence[0][length]


@pytest.mark.slow
def test_dropout_acts_with_seeds_only() -> None:
    from mindspore import Tensor

    model = trained(fresh_golden_model("glm2_tiny"), LoraConfig(4, 8.0, 0.5))
    plain = model(IDS).asnumpy()
    without = trained(fresh_golden_model("glm2_tiny"), LoraConfig(4, 8.0, 0.0))
    np.testing.assert_array_equal(without(IDS).asnumpy(), plain)
    rows = [IDS, np.ones_like(IDS), np.tile(np.arange(20), (2, 1)), np.arange(20), np.array([3, 4])]
    dropped = model.network(*(Tensor(x.astype(np.int32)) for x in rows)).asnumpy()
    assert np.abs(dropped - plain).max() > 1e-2


def saved(model: GLMForCausalLM, folder: Path) -> Path:
    folder.mkdir()
    model.adapter.save(folder, "base")
    return folder


def base_folder(folder: Path, dtype: str | None = None) -> Path:
    """glm3_tiny as a Hugging Face folder of several shards."""
    tool = load_script("tools/convert_weight.py")
    arguments = ["--input", str(FOLDER / "glm3_tiny"), "--output", str(folder), "--max_shard_size", "300KB"]
    assert tool.main(arguments + (["--dtype", dtype] if dtype else [])) == 0
    return folder


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]):
    """merge(*arguments) -> exit status and what was shown."""
    tool = load_script("tools/merge_lora.py")

    def run(*arguments: object) -> tuple[int, str]:
        status = tool.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def test_merged_and_unmerged_agree_and_it_comes_out_again(tmp_path: Path, merge) -> None:
    base = base_folder(tmp_path / "base")
    config = LoraConfig(4, 12.0, 0.1, ("query_key_value", "dense_4h_to_h", "output_layer"))
    # As large as a trained one: far larger updates blow the rounding of the network up in both.
    model = trained(fresh_golden_model("glm3_tiny"), config, size=0.05)
    assert np.abs(model(IDS).asnumpy() - golden_model("glm3_tiny")(IDS).asnumpy()).max() > 0.3
    adapter = saved(model, tmp_path / "adapter")
    status, shown = merge("--base", base, "--adapter", adapter, "--output", tmp_path / "merged")
    assert status == 0, shown
    assert "merged into 7 of" in shown
    merged = load_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(merged(IDS).asnumpy(), model(IDS).asnumpy(), atol=1e-5, rtol=0)
    arguments = ("--base", tmp_path / "merged", "--adapter", adapter, "--remove")
    status, shown = merge(*arguments, "--output", tmp_path / "again.ckpt")
    assert status == 0, shown
    again, first = load_pretrained(tmp_path / "again.ckpt", base), load_pretrained(base)
    for name, parameter in first.parameters().items():
        np.testing.assert_allclose(again.parameters()[name].asnumpy(), parameter.asnumpy(), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_float16_base_stays_float16(tmp_path: Path, merge) -> None:
    base = base_folder(tmp_path / "base", "float16")
    model = load_pretrained(base)
    adapter = saved(trained(model, LoraConfig(4, 8.0, 0.0)), tmp_path / "adapter")
    status, shown = merge("--base", base, "--adapter", adapter, "--output", tmp_path / "merged.safetensors")
    assert status == 0, shown
    assert "(float16)" in shown
    merged = load_pretrained(tmp_path / "merged.safetensors", base)
    np.testing.assert_allclose(merged(IDS).asnumpy(), model(IDS).asnumpy(), atol=2e-2, rtol=0)


def test_merges_that_make_no_sense(tmp_path: Path, merge) -> None:
    base = base_folder(tmp_path / "base")
    fresh = fresh_golden_model("glm3_tiny")
    fresh.add_adapter(LoraConfig())
    untrained = saved(fresh, tmp_path / "untrained")
    prefixed = fresh_golden_model("glm3_tiny")
    prefixed.add_adapter(PrefixConfig(4))
    prefix = saved(prefixed, tmp_path / "prefix")
    other = saved(trained(fresh_golden_model("glm2_tiny"), LoraConfig()), tmp_path / "other")
    for adapter, reason in (
        (untrained, "changes nothing"),
        (prefix, "a P-Tuning prefix cannot be merged"),
        (other, "made for another base"),
        (tmp_path / "nowhere", "no such file"),
        (base, "no adapter"),
    ):
        status, shown = merge("--base", base, "--adapter", adapter, "--output", tmp_path / "out")
        assert status == 1
        assert str(adapter) in shown
        assert reason in shown
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_damaged_checkpoint_of_a_run_is_not_merged(name: str, tmp_path: Path, merge) -> None:
    base = FOLDER / "glm2_tiny"
    folder = tmp_path / "run" / "checkpoint" / "step_00000001"
    shutil.copytree(FOLDER.parent / "train" / "lora" / "final", folder)
    write_manifest_values(folder, {"format_version": 1, "files": describe_files(folder)})
    arguments = ("--base", base, "--adapter", tmp_path / "run", "--output", tmp_path / "out.ckpt")
    status, shown = merge(*arguments)
    assert status == 0, shown
    content = bytearray((folder / name).read_bytes())
    content[-30] ^= 1
    (folder / name).write_bytes(content)
    status, shown = merge(*arguments, "--overwrite")
    assert status == 1
    assert str(folder / name) in shown


def test_a_merge_that_overflows(tmp_path: Path, merge) -> None:
    tensors = load_file(FOLDER.parent / "train" / "lora" / "final" / "adapter_model.safetensors")
    shutil.copytree(FOLDER.parent / "train" / "lora" / "final", tmp_path / "lora")
    huge = {name: np.full_like(tensor, 1e25) for name, tensor in tensors.items()}
    save_file(huge, tmp_path / "lora" / "adapter_model.safetensors")
    status, shown = merge("--base", FOLDER / "glm2_tiny", "--adapter", tmp_path / "lora", "--output", tmp_path / "out")
    assert status == 1
    assert "query_key_value.weight with the adapter: contains NaN or infinity" in shown
    assert not (tmp_path / "out").exists()


def test_half_a_pair_is_no_delta(tmp_path: Path) -> None:
    adapter = saved(trained(fresh_golden_model("glm2_tiny"), LoraConfig()), tmp_path / "adapter")
    stored = read_adapter(adapter)
    stored.tensors.pop(next(name for name in stored.tensors if "lora_B" in name))
    with pytest.raises(AdapterError, match="only one of lora_A and lora_B"):
        lora_deltas(stored)


def test_the_config_says_what_peft_needs(tmp_path: Path) -> None:
    config = LoraConfig(4, 12.0, 0.1, ("query_key_value",))
    adapter = saved(trained(fresh_golden_model("glm2_tiny"), config), tmp_path / "adapter")
    document = json.loads((adapter / "adapter_config.json").read_text())
    assert document["peft_type"] == "LORA"
    assert (document["r"], document["lora_alpha"], document["lora_dropout"]) == (4, 12, 0.1)
    assert document["target_modules"] == ["query_key_value"]
    assert document["base_model_name_or_path"] == "base"
    assert read_adapter(adapter).config == config


@pytest.mark.parametrize(
    "config", [LoraConfig(4, 8.0, 0.1), pytest.param(PrefixConfig(4, True), marks=pytest.mark.slow)]
)
def test_float32_adapters_train_over_a_float16_base(config) -> None:
    """As on an Ascend card: the base in half precision, its gradients scaled, the adapter in float32."""
    import mindspore as ms
    from mindspore import Tensor

    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep

    sizes = GLMConfig.from_pretrained(FOLDER / "glm2_tiny")
    half = dataclasses.replace(sizes, param_init_type="float16", compute_dtype="float16")
    model = GLMForCausalLM.from_parameters(half, golden_weights("glm2_tiny").items())
    adapter = model.add_adapter(config)
    assert {str(p.dtype) for p in model.parameters().values()} == {"Float16"}
    optimizer = GLMAdamW(model.network.trainable_params(), 0.01)
    scale = {
        "type": "DynamicLossScaleUpdateCell",
        "loss_scale_value": 1024,
        "scale_factor": 2,
        "scale_window": 100,
    }
    ms.set_context(mode=ms.GRAPH_MODE)
    step = GLMTrainOneStep(TrainingNetwork(model.network, 20), optimizer, 1.0, loss_scale=scale)
    rows = [IDS, IDS, np.ones_like(IDS), np.tile(np.arange(20), (2, 1)), np.array([3, 4])]
    losses = [float(step(*(Tensor(x.astype(np.int32)) for x in rows))[0].asnumpy()) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3
    assert {str(p.dtype) for p in adapter.parameters()} == {"Float32"}
