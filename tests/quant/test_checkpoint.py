"""Quantized checkpoints: written, mapped into memory, refused where they do not fit; official files of ChatGLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import FOLDER, fresh_golden_model, golden_numbers, golden_weights
from safetensors.numpy import load_file, save_file

from glm_ms import load_pretrained
from glm_ms.commands import main as glm_ms
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.reader import open_checkpoint
from glm_ms.generation import GLMForCausalLM
from glm_ms.model.config import GLMConfig
from glm_ms.ops.cpu.library import SWITCH
from glm_ms.ops.packing import Packed, dequantise
from glm_ms.quant import Quantization, QuantizationError, quantization
from glm_ms.quant.checkpoint import described_quantization, weights_of
from glm_ms.storage.errors import CheckpointError

CASE = "glm3_tiny"
NAMES = ("input_ids", "attention_mask", "position_ids")
FILES = ("model.safetensors", "config.json")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden model as `glm-ms quantize` writes it."""
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    assert glm_ms(["quantize", "--model", str(FOLDER / CASE), "--bits", "4", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def damaged(int4: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(int4, tmp_path / "damaged"))


def parameters(model: GLMForCausalLM) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy() for name, parameter in model.parameters().items()}


def config_of(folder: Path) -> GLMConfig:
    return GLMConfig.from_pretrained(folder)


def stored(folder: Path, wanted: Quantization | None = None) -> dict[str, np.ndarray]:
    """What a network is built of, without a network."""
    with open_checkpoint(folder) as reader:
        return dict(weights_of(reader, config_of(folder), wanted)[1])


def change_tensors(folder: Path, **changes: Any) -> None:
    """Rewrites the file; a change is a function of the array, or None to remove the tensor."""
    tensors = load_file(folder / FILES[0])
    for name, change in changes.items():
        (full,) = (key for key in tensors if key.endswith(name.replace("__", ".")) and (".0." in key or "out" in key))
        if change is None:
            del tensors[full]
        else:
            tensors[full] = change(tensors[full])
    save_file(tensors, folder / FILES[0], {"format": "ms"})


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_the_model_quantized_in_memory(bits: int, tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    arguments = ["quantize", "--model", str(FOLDER / CASE), "--bits", str(bits), "--output", str(output)]
    assert glm_ms(arguments) == 0
    model, expected = load_pretrained(output), fresh_golden_model(CASE).quantize(bits)
    assert model.quantization is not None
    assert model.quantization.numbers == (bits, 32 if bits == 4 else 0)
    found = parameters(model)
    for name, value in parameters(expected).items():
        np.testing.assert_array_equal(found.pop(name), value, err_msg=name)
    assert not found
    if bits == 4:
        numbers = [golden_numbers(CASE)[name] for name in NAMES]
        np.testing.assert_array_equal(model(*numbers).asnumpy(), expected(*numbers).asnumpy())


def test_packed_weights_are_mapped_and_not_copied(int4: Path) -> None:
    model = load_pretrained(int4)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if len(line) > 5 and line[5] == str((int4 / FILES[0]).resolve())]
    places = [(int(start, 16), int(end, 16)) for start, end in ranges]
    linear = model.network.transformer.encoder.layers[0].mlp.dense_h_to_4h
    table = model.network.transformer.embedding.embedding_table
    for parameter in (linear.quantized.weight, linear.quantized.scale, table):
        address = parameter.data_ptr()
        assert any(start <= address < end for start, end in places), parameter.name
    assert linear.quantized.weight.data_ptr() % 64 == 0


def test_files_of_a_quantized_folder(int4: Path) -> None:
    assert sorted(path.name for path in int4.iterdir()) == sorted(FILES)
    section = json.loads((int4 / "config.json").read_text())["quantization"]
    assert section == {"bits": 4, "group": 32, "output_layer": True, "embedding": "float32"}
    assert described_quantization(int4) == Quantization(4, 32, embedding="float32")
    header = load_file(int4 / FILES[0])
    names = [name for name in header if ".layers.0.self_attention.dense." in name]
    assert sorted(name.rpartition("dense.")[2] for name in names) == ["quantized.scale", "quantized.weight"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_embedding_keeps_its_type(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file, and in memory where something reads it there: the portable operators read no bfloat16."""
    half, name = tmp_path / "half", "transformer.embedding.embedding_table"
    assert glm_ms(["convert", "--input", str(FOLDER / CASE), "--output", str(half), "--dtype", dtype]) == 0
    assert glm_ms(["quantize", "--model", str(half), "--bits", "8", "--output", str(tmp_path / "int8")]) == 0
    found, expected = stored(tmp_path / "int8"), Tensor(golden_weights(CASE)[name], getattr(ms, dtype))
    table = found[name].view(np.uint16)
    np.testing.assert_array_equal(table, expected.asnumpy().view(np.uint16))
    assert described_quantization(tmp_path / "int8").embedding == dtype
    numbers = [golden_numbers(CASE)[name] for name in NAMES]
    with_kernels = load_pretrained(tmp_path / "int8")
    assert with_kernels.parameters()[name].dtype == getattr(ms, dtype)
    monkeypatch.setenv(SWITCH, "0")
    portable = load_pretrained(tmp_path / "int8")
    assert portable.parameters()[name].dtype == (ms.float16 if dtype == "float16" else ms.float32)
    np.testing.assert_array_equal(with_kernels(*numbers).asnumpy(), portable(*numbers).asnumpy())
    norm = "transformer.encoder.final_layernorm.weight"
    assert found[norm].dtype == np.float32


def test_the_same_bits_may_be_asked_for_again_but_no_others(int4: Path) -> None:
    assert stored(int4, quantization(4)).keys() == stored(int4).keys()
    for other in (quantization(8), quantization(4, 64)):
        with pytest.raises(QuantizationError, match=r"quantized already \(int4, .* 32 inputs\).* cannot become"):
            stored(int4, other)


def not_a_number(scale: np.ndarray) -> np.ndarray:
    scale = scale.copy()
    scale.reshape(-1)[3] = np.nan
    return scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp__dense_4h_to_h__quantized__scale": not_a_number}, "dense_4h_to_h.quantized.scale: contains NaN"),
        ({"mlp__dense_4h_to_h__quantized__scale": None}, "1 missing"),
        ({"mlp__dense_h_to_4h__quantized__weight": None}, "1 missing"),
        ({"mlp__dense_4h_to_h__quantized__weight": lambda q: q[:-1]}, "of the wrong shape"),
        ({"mlp__dense_4h_to_h__quantized__weight": lambda q: q.view(np.int8)}, "int8, not uint8"),
        ({"mlp__dense_4h_to_h__quantized__scale": lambda s: s.astype(np.float32)}, "float32, not float16"),
        ({"mlp__dense_4h_to_h__quantized__weight": lambda q: q.astype(np.int16)}, "int16, not uint8"),
    ],
)
def test_damaged_files_are_refused_by_name(damaged: Path, changes: dict[str, Any], message: str) -> None:
    change_tensors(damaged, **changes)
    with pytest.raises(CheckpointError, match=message):
        stored(damaged)


def test_a_config_of_other_bits_is_refused(damaged: Path) -> None:
    file = damaged / "config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "quantization": {**document["quantization"], "bits": 8, "group": 0}}))
    with pytest.raises(QuantizationError, match=r"config\.json: says int8.*but the weights of .* are int4"):
        load_pretrained(damaged)


def test_an_unknown_kind_is_refused(damaged: Path) -> None:
    tensors = load_file(damaged / FILES[0])
    kept = {name: value.astype(np.int16) if value.dtype == np.uint8 else value for name, value in tensors.items()}
    save_file(kept, damaged / FILES[0])
    with pytest.raises(QuantizationError, match="of an unknown kind"):
        stored(damaged)


def test_a_truncated_file_is_refused(damaged: Path) -> None:
    content = (damaged / FILES[0]).read_bytes()
    (damaged / FILES[0]).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        stored(damaged)


@pytest.mark.parametrize(
    ("tool", "flag", "more"),
    [("convert", "--input", []), ("quantize", "--model", ["--bits", "8"])],
)
def test_other_tools_refuse_quantized_weights_by_name(
    int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str, flag: str, more: list[str]
) -> None:
    dtype = ["--dtype", "float32"] if tool == "convert" else []
    assert glm_ms([tool, flag, str(int4), "--output", str(tmp_path / "out"), *more, *dtype]) == 1
    shown = capsys.readouterr().err
    assert f"{int4}: quantized weights (int4 or int8), and floating point weights are needed here" in shown
    assert "missing" not in shown
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused(int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["quantize", "--model", str(FOLDER / CASE), "--output", str(int4)]
    assert glm_ms([*source, "--bits", "8"]) == 1
    assert "exists" in capsys.readouterr().err
    assert (
        glm_ms(["quantize", "--model", str(FOLDER / CASE), "--output", str(tmp_path), "--bits", "8", "--group", "32"])
        == 1
    )
    assert "groups are for 4 bits" in capsys.readouterr().err


def test_a_config_that_promises_quantized_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / CASE, tmp_path / "model"))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_bit": 4}))
    with pytest.raises(QuantizationError, match=r"says that the weights are quantized .* remove quantization_bit"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**document, "quantization_bit": 3}))
    with pytest.raises(QuantizationError, match="quantization_bit = 3: not known"):
        load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**document, "quantization_bit": 0}))
    assert load_pretrained(folder).quantization is None


def official(folder: Path, bits: int) -> dict[str, np.ndarray]:
    """Writes a folder as chatglm2-6b-int4 is: layers of blocks in integers, all else float16; returns the float32
    weights that the reference's kernels extract: integer times scale."""
    shutil.copytree(FOLDER / CASE, folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_bit": bits, "torch_dtype": "float16"}))
    tensors: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for name, value in golden_weights(CASE).items():
        in_file = name.replace("embedding.embedding_table", "embedding.word_embeddings.weight")
        if ".layers." not in name or value.ndim < 2:
            tensors[in_file] = expected[name] = value.astype(np.float16)
            continue
        scale = (np.abs(value).max(-1) / (2 ** (bits - 1) - 1)).astype(np.float16)
        q = np.rint(value / scale[:, None].astype(np.float32)).astype(np.int8)
        expected[name] = q.astype(np.float32) * scale[:, None].astype(np.float32)
        tensors[name] = q if bits == 8 else (q[:, 0::2] << 4) | (q[:, 1::2] & 15)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / FILES[0], {"format": "pt"})
    return {name: value.astype(np.float32) for name, value in expected.items()}


@pytest.mark.parametrize("bits", [8, 4])
def test_official_files_load_exactly(bits: int, tmp_path: Path) -> None:
    expected = official(tmp_path / "official", bits)
    found = stored(tmp_path / "official")
    group = 0 if bits == 8 else 128
    shapes = expected_shapes(config_of(tmp_path / "official"))
    for name, value in expected.items():
        module = name.removesuffix(".weight")
        if name in found:
            np.testing.assert_array_equal(found.pop(name).astype(np.float32), value, err_msg=name)
            continue
        packed = Packed(
            found.pop(f"{module}.quantized.weight"), found.pop(f"{module}.quantized.scale"), shapes[name], group
        )
        np.testing.assert_array_equal(dequantise(packed), value, err_msg=name)
    assert not found


def test_an_official_model_computes_as_its_dequantised_weights(tmp_path: Path) -> None:
    expected = official(tmp_path / "official", 4)
    model = load_pretrained(tmp_path / "official")
    assert model.quantization == Quantization(4, 128, output_layer=False, embedding="float16")
    plain = GLMForCausalLM.from_parameters(fresh_golden_model(CASE).config, expected.items())
    numbers = [golden_numbers(CASE)[name] for name in NAMES]
    np.testing.assert_allclose(model(*numbers).asnumpy(), plain(*numbers).asnumpy(), rtol=1e-4, atol=1e-4)


def test_official_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    official(tmp_path / "official", 8)
    tensors = load_file(tmp_path / "official" / FILES[0])
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    save_file({**tensors, name: tensors[name][:, :-1]}, tmp_path / "official" / FILES[0])
    with pytest.raises(CheckpointError, match=r"dense_4h_to_h\.weight in .*: expected"):
        stored(tmp_path / "official")
    broken = tensors[name].copy()
    broken[2, 3] = -128
    save_file({**tensors, name: broken}, tmp_path / "official" / FILES[0])
    with pytest.raises(QuantizationError, match="has -128"):
        stored(tmp_path / "official")
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "official" / FILES[0])
    with pytest.raises(CheckpointError, match="1 missing"):
        stored(tmp_path / "official")
