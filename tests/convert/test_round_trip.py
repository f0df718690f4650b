"""What goes into a conversion comes out of it, bit by bit, and other programs read it the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_file_torch

from glm_ms import GLMConfig
from glm_ms.convert import mindspore_file
from glm_ms.convert.dtypes import bfloat16_to_float32
from glm_ms.convert.names import expected_shapes, to_hf_name
from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.convert.writers import write_file

CASES = (
    "glm2_tiny", "glm3_tiny", "glm3_32k_tiny", "glm2_mha", "glm2_no_final_norm", "glm2_res_post_ln",
    "glm2_bias_layernorm",
)  # fmt: skip


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bitwise(
    golden: Path, tmp_path: Path, convert, assert_bitwise_equal, case: str, ending: str
) -> None:
    source = golden / "models" / case
    middle = convert(source, tmp_path / f"model{ending}")
    back = convert(middle, tmp_path / "back", config=source)
    assert_bitwise_equal(back, source)
    assert GLMConfig.from_pretrained(back) == GLMConfig.from_pretrained(source)


def test_sharded_bin_equals_the_single_file(golden: Path, tmp_path: Path, convert, assert_bitwise_equal) -> None:
    source = golden / "models" / "glm2_tiny"
    assert_bitwise_equal(convert(source / "sharded", tmp_path / "hf"), source)


def test_sharded_float16_keeps_its_type_and_bits(golden: Path, tmp_path: Path, convert) -> None:
    source = golden / "models" / "glm3_tiny" / "sharded_fp16"
    stored: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.bin"):
        stored.update(torch.load(shard, weights_only=True))
    ckpt = convert(source, tmp_path / "model.ckpt")
    back = convert(ckpt, tmp_path / "hf", config=source, max_shard_size=100_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        ours = load_file_torch(back / index["weight_map"][name])[name]
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor), name
    for file in back.glob("*.safetensors"):
        tensors = load_file_torch(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("slice_bytes", [mindspore_file._ENTRY_BYTES, 1000])
def test_mindspore_reads_what_is_written(
    golden: Path, tmp_path: Path, convert, monkeypatch: pytest.MonkeyPatch, dtype: str, slice_bytes: int
) -> None:
    import mindspore as ms

    monkeypatch.setattr(mindspore_file, "_ENTRY_BYTES", slice_bytes)
    source = golden / "models" / "glm2_bias_layernorm"
    ckpt = convert(source, tmp_path / "model.ckpt", dtype=dtype)
    loaded = ms.load_checkpoint(str(ckpt))
    original = load_file_torch(source / "model.safetensors")
    assert list(loaded) == open_checkpoint(source).names()
    for name, parameter in loaded.items():
        expected = original[to_hf_name(name, GLMConfig())].to(getattr(torch, dtype))
        assert parameter.dtype == getattr(ms, dtype)
        values = parameter.asnumpy().astype(np.float32)
        np.testing.assert_array_equal(values, expected.float().numpy(), strict=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("slice_kib", [512 * 1024, 1])
def test_what_mindspore_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, ending: str, slice_kib: int
) -> None:
    import mindspore as ms

    monkeypatch.setattr(ms.train.serialization, "SLICE_SIZE", slice_kib)
    values = {
        "a": np.random.default_rng(0).standard_normal((70, 33)).astype(np.float32),
        "b": np.arange(5, dtype=np.float32),
    }
    parameters = [{"name": name, "data": ms.Tensor(array).astype(getattr(ms, dtype))} for name, array in values.items()]
    path = tmp_path / f"model.{ending}"
    ms.save_checkpoint(parameters, str(path), format=ending, crc_check=ending == "ckpt")
    with open_checkpoint(path) as reader:
        assert sorted(reader.names()) == ["a", "b"]
        for name, array in values.items():
            assert (reader.dtype(name), reader.shape(name)) == (dtype, array.shape)
            expected = torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()
            np.testing.assert_array_equal(reader.read(name, "float32"), expected, strict=True)


def test_training_state_in_a_checkpoint_is_left_out(golden: Path, tmp_path: Path) -> None:
    import mindspore as ms

    source = golden / "models" / "glm2_tiny"
    config = GLMConfig.from_pretrained(source)
    weights = dict(load_parameters(open_checkpoint(source), config, "float32"))
    state = {f"{kind}.{name}": array for kind in ("adam_m", "adam_v") for name, array in weights.items()}
    parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in {**weights, **state}.items()]
    path = tmp_path / "training.ckpt"
    ms.save_checkpoint(
        parameters, str(path), append_dict={"epoch_num": 3, "step_num": 7, "loss_scale": 4096.0, "global_step": 21}
    )
    reader = open_checkpoint(path)
    assert sorted(reader.ignored) == sorted([*state, "epoch_num", "step_num", "loss_scale", "global_step"])
    for name, array in load_parameters(reader, config, "float32"):
        np.testing.assert_array_equal(array, weights[name], strict=True)


def test_embedding_of_newer_mindformers_is_read(golden: Path, tmp_path: Path) -> None:
    source = golden / "models" / "glm2_tiny"
    config = GLMConfig.from_pretrained(source)
    weights = {
        name.replace("embedding_table", "embedding_weight"): array
        for name, array in load_parameters(open_checkpoint(source), config, "float32")
    }
    shapes = {name: array.shape for name, array in weights.items()}
    write_file(tmp_path / "new.ckpt", shapes, "float32", weights.items())
    reader = open_checkpoint(tmp_path / "new.ckpt")
    assert sorted(reader.names()) == sorted(expected_shapes(config))
    assert len(list(load_parameters(reader, config, "float32"))) == len(weights)


def test_bfloat16_parameters_are_bit_patterns(golden: Path) -> None:
    source = golden / "models" / "glm2_tiny"
    config = GLMConfig.from_pretrained(source)
    original = load_file(source / "model.safetensors")
    for name, bits in load_parameters(open_checkpoint(source), config, "bfloat16"):
        expected = torch.from_numpy(original[to_hf_name(name, config)]).bfloat16().float().numpy()
        np.testing.assert_array_equal(bfloat16_to_float32(bits), expected, strict=True)


def test_bfloat16_bin_is_read(tmp_path: Path) -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.save({"a": tensor.T, "b": tensor}, tmp_path / "pytorch_model.bin")
    reader = open_checkpoint(tmp_path)
    assert reader.dtype("a") == "bfloat16"
    np.testing.assert_array_equal(reader.read("a", "float32"), tensor.T.float().numpy(), strict=True)
    np.testing.assert_array_equal(reader.read("b", "float32"), tensor.float().numpy(), strict=True)


def test_pytorch_files_from_before_zip_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": tensor}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "old.bin").read("a"), tensor.numpy(), strict=True)


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
def test_a_folder_with_one_file_of_any_name_is_read(golden: Path, tmp_path: Path, convert, name: str) -> None:
    source = golden / "models" / "glm2_tiny"
    convert(source, tmp_path / name)
    assert open_checkpoint(tmp_path).names() == open_checkpoint(source).names()
