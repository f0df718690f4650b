"""Broken, missing and misnamed files: each is an error that names the file and the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from glm_ms import GLMConfig, load_pretrained
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.reader import check_names_and_shapes, load_parameters, open_checkpoint
from glm_ms.model.config import ConfigError
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import describe_files, write_manifest_values

SHARD = "pytorch_model-00002-of-00004.bin"


@pytest.fixture
def sharded(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden / "models" / "glm2_tiny" / "sharded", tmp_path / "sharded"))


@pytest.fixture
def safetensors_file(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(golden / "models" / "glm2_tiny" / "model.safetensors", tmp_path / "m.safetensors"))


@pytest.fixture
def ckpt_file(golden: Path, tmp_path: Path, convert) -> Path:
    return convert(golden / "models" / "glm2_tiny", tmp_path / "m.ckpt")


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
@pytest.mark.parametrize("kind", ["safetensors_file", "ckpt_file"])
def test_truncated_file(request: pytest.FixtureRequest, kind: str, size: int) -> None:
    path = request.getfixturevalue(kind)
    _truncate(path, size)
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(path)


def test_every_truncation_of_a_ckpt_is_noticed(golden: Path, ckpt_file: Path) -> None:
    config = GLMConfig.from_pretrained(golden / "models" / "glm2_tiny")
    content = ckpt_file.read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(content), 9973)]:
        ckpt_file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"m\.ckpt"):
            check_names_and_shapes(config, open_checkpoint(ckpt_file))


def test_random_damage_is_an_error_or_changes_only_values(golden: Path, ckpt_file: Path) -> None:
    config = GLMConfig.from_pretrained(golden / "models" / "glm2_tiny")
    content = ckpt_file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[int(rng.integers(0, 120))] = int(rng.integers(0, 256))
        ckpt_file.write_bytes(damaged)
        try:
            assert len(list(load_parameters(open_checkpoint(ckpt_file), config, "float32"))) == 17
        except CheckpointError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_truncated_shard(sharded: Path, size: int) -> None:
    _truncate(sharded / SHARD, size)
    with pytest.raises(CheckpointError, match=SHARD):
        open_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json: 1 of 4 shards missing: {SHARD}"):
        open_checkpoint(sharded)


def _edit_index(folder: Path, **changes: str | None) -> None:
    path = folder / "pytorch_model.bin.index.json"
    document = json.loads(path.read_text())
    for name, shard in changes.items():
        document["weight_map"][name] = shard
    document["weight_map"] = {name: shard for name, shard in document["weight_map"].items() if shard}
    path.write_text(json.dumps(document))


def test_index_that_names_a_shard_without_the_tensor(sharded: Path) -> None:
    _edit_index(sharded, **{"transformer.output_layer.weight": SHARD})
    with pytest.raises(CheckpointError, match=rf"output_layer\.weight \(should be in {SHARD}\)"):
        open_checkpoint(sharded)


def test_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    _edit_index(sharded, **{"transformer.encoder.final_layernorm.weight": None})
    with pytest.raises(CheckpointError, match=r"not listed: .*final_layernorm\.weight"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/b.bin"])
def test_index_may_not_lead_elsewhere(sharded: Path, name: str) -> None:
    _edit_index(sharded, **{"transformer.output_layer.weight": name})
    with pytest.raises(CheckpointError, match="is not a file name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [({"total_size": 1}, "total_size = 1, but the tensors of its shards have"), ({"total_size": "many"}, "'many'"),
     ([], "must be an object")]
)  # fmt: skip
def test_the_size_in_an_index_is_compared(sharded: Path, metadata: object, words: str) -> None:
    path = sharded / "pytorch_model.bin.index.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "metadata": metadata}))
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{words}"):
        open_checkpoint(sharded)
    del document["metadata"]
    path.write_text(json.dumps(document))
    open_checkpoint(sharded)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_behind_a_torch_file(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(300)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    np.testing.assert_array_equal(open_checkpoint(path).read("a"), np.ones(300))
    for surplus in (b"\0", b"PK\5\6", bytes(70000)):
        path.write_bytes(content + surplus)
        with pytest.raises(CheckpointError, match=r"a\.bin"):
            open_checkpoint(path).read("a")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\xff" * 100, "no known format"),
    ],
)
def test_content_that_is_no_checkpoint(tmp_path: Path, ending: str, content: bytes, words: str) -> None:
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*{words}"):
        open_checkpoint(path)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".bin"])
def test_file_that_is_not_what_its_ending_says(
    sharded: Path, safetensors_file: Path, ckpt_file: Path, tmp_path: Path, ending: str
) -> None:
    for original in (safetensors_file, ckpt_file, sharded / SHARD):
        if original.suffix == ending:
            continue
        wrong = tmp_path / f"wrong{ending}"
        shutil.copy(original, wrong)
        with pytest.raises(CheckpointError, match=rf"wrong.*name it \{original.suffix}"):
            open_checkpoint(wrong)


def test_unknown_ending_missing_path_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown ending; known are \.safetensors"):
        open_checkpoint(tmp_path / "file.onnx")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)


def test_folder_with_two_candidates(tmp_path: Path, safetensors_file: Path) -> None:
    shutil.copy(safetensors_file, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors, other\.safetensors"):
        open_checkpoint(tmp_path)


def test_torch_missing(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r'pip install "glm_ms\[torch\]"'):
        open_checkpoint(sharded)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    torch.save({"a": Harmful()}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        open_checkpoint(tmp_path / "model.bin")
    assert not (tmp_path / "touched").exists()


def test_bin_with_other_things_than_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="'epoch'"):
        open_checkpoint(tmp_path / "a.bin")
    torch.save([torch.zeros(1)], tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match="expected a dict of tensors, found list"):
        open_checkpoint(tmp_path / "b.bin")


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_ckpt(tmp_path: Path, mode: str) -> None:
    import mindspore as ms

    path = tmp_path / "secret.ckpt"
    parameters = [{"name": "a", "data": ms.Tensor(np.ones((4, 4), np.float32))}]
    ms.save_checkpoint(parameters, str(path), enc_key=b"0123456789ABCDEF", enc_mode=mode)
    with pytest.raises(CheckpointError, match=r"secret\.ckpt: encrypted"):
        open_checkpoint(path)


def test_crc_of_a_ckpt_is_verified(tmp_path: Path) -> None:
    import mindspore as ms

    path = tmp_path / "crc.ckpt"
    parameters = [{"name": "a", "data": ms.Tensor(np.ones((64, 64), np.float32))}]
    ms.save_checkpoint(parameters, str(path), crc_check=True)
    np.testing.assert_array_equal(open_checkpoint(path).read("a"), np.ones((64, 64), np.float32))
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC does not match"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        17,
    ],
)
def test_broken_safetensors_header(tmp_path: Path, entry: object) -> None:
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        open_checkpoint(path)


def test_one_error_lists_everything_that_does_not_fit(golden: Path, tmp_path: Path) -> None:
    source = golden / "models" / "glm2_tiny"
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.output_layer.wieght"] = tensors.pop("transformer.output_layer.weight")
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    tensors["transformer.encoder.final_layernorm.weight"] = np.ones(64, np.int64)
    tensors["stranger"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "bad.safetensors")
    reader = open_checkpoint(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_names_and_shapes(GLMConfig.from_pretrained(source), reader)
    for words in (
        "1 missing:\n    transformer.output_layer.weight [512, 64]",
        "2 unexpected",
        "wieght [512, 64] in bad.safetensors; did you mean transformer.output_layer.weight?",
        "stranger [3] in bad.safetensors",
        f"1 of the wrong shape:\n    {name} in bad.safetensors: expected [64, 176], found [176, 64]",
        "1 not floating point:\n    transformer.encoder.final_layernorm.weight in bad.safetensors: int64",
    ):
        assert words in str(caught.value)


def test_long_lists_are_capped_with_their_total(golden: Path, safetensors_file: Path) -> None:
    config = GLMConfig.from_pretrained(golden / "models" / "glm3_tiny")
    with pytest.raises(CheckpointError, match=r"(?s)17 of the wrong shape.*\.\.\. and 7 more"):
        check_names_and_shapes(config, open_checkpoint(safetensors_file))


def test_parameter_stored_under_two_names(tmp_path: Path) -> None:
    array = np.ones((2, 2), np.float32)
    names = ("transformer.embedding.embedding_table", "transformer.embedding.word_embeddings.weight")
    save_file(dict.fromkeys(names, array), tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="stored twice"):
        open_checkpoint(tmp_path / "twice.safetensors")


def test_unknown_name_comes_with_a_near_one(safetensors_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean transformer\.output_layer\.weight"):
        open_checkpoint(safetensors_file).read("transformer.output_layer.weigth")


def test_unknown_dtype_is_refused_at_once(golden: Path, safetensors_file: Path) -> None:
    config = GLMConfig.from_pretrained(golden / "models" / "glm2_tiny")
    with pytest.raises(CheckpointError, match="'float8': must be one of float32, float16, bfloat16"):
        load_parameters(open_checkpoint(safetensors_file), config, "float8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_numbers_that_are_not_finite(golden: Path, tmp_path: Path, dtype: str, value: float) -> None:
    source = Path(shutil.copytree(golden / "models" / "glm2_tiny", tmp_path / "source"))
    state = {name: torch.tensor(array) for name, array in load_file(source / "model.safetensors").items()}
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    state["transformer.output_layer.weight"][511, 63] = value
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    config = GLMConfig.from_pretrained(source)
    message = r"pytorch_model\.bin: transformer\.output_layer\.weight: contains NaN or infinity"
    with pytest.raises(CheckpointError, match=message):
        list(load_parameters(open_checkpoint(source), config, "float32"))
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(source, tmp_path / "out", dtype=dtype).run()
    assert not (tmp_path / "out").exists()


def _flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("door", [load_pretrained, lambda path: plan_conversion(path, path.parent / "out.ckpt").run()])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_manifest_is_compared_whenever_weights_are_read(golden: Path, tmp_path: Path, name: str, door) -> None:
    """In an output folder of a run."""
    source = tmp_path / "run" / "checkpoint" / "step_00000001"
    source.mkdir(parents=True)
    for file in ("model.safetensors", "config.json"):
        shutil.copy(golden / "models" / "glm2_tiny" / file, source)
    write_manifest_values(source, {"format_version": 1, "files": describe_files(source)})
    plan_conversion(tmp_path / "run", tmp_path / "intact.ckpt").run()
    path = source / name
    _flip_bit(path, path.stat().st_size - 9 if name == "model.safetensors" else path.read_bytes().index(b"5"))
    with pytest.raises((CheckpointError, ConfigError), match=name):
        door(tmp_path / "run")


def test_a_manifest_of_another_program_is_ignored(golden: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(golden / "models" / "glm2_tiny", tmp_path / "source"))
    (source / "manifest.json").write_text('{"files": {}}')
    plan_conversion(source, tmp_path / "out.ckpt").run()
    write_manifest_values(source, {"format_version": 1, "files": {}})
    with pytest.raises(CheckpointError, match="was added later"):
        plan_conversion(source, tmp_path / "again.ckpt").run()


def test_one_bit_of_a_torch_file(sharded: Path) -> None:
    path = sharded / SHARD
    _flip_bit(path, path.stat().st_size // 2)
    config = GLMConfig.from_pretrained(sharded.parent / "sharded")
    with pytest.raises(CheckpointError, match=f"{SHARD}: damaged: the CRC-32"):
        list(load_parameters(open_checkpoint(sharded), config, "float32"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({1: torch.zeros(2)}, "keys that are not names"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse"),
        ({"a": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])}, "nested"),
        ({"a": torch.zeros(2), "b": np.float32(1)}, r"something besides tensors, .* torch\.save\(model\.state_dict"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "type float8_e4m3fn cannot be read"),
        ({"module": {"a": torch.zeros(2)}}, "save the state dict alone"),
    ],
)
def test_torch_files_with_other_tensors(tmp_path: Path, entry: dict, words: str) -> None:
    torch.save(entry, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=rf"a\.bin.*{words}"):
        open_checkpoint(tmp_path / "a.bin").read("a")


def test_damaged_pickles_end_in_a_sentence(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.bin", np.random.default_rng(0)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            for name in open_checkpoint(path).names():
                open_checkpoint(path).read(name)
        except CheckpointError as error:
            assert "a.bin" in str(error)  # noqa: PT017, many inputs are harmless


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{" + b" " * 92, "a header of 100000001 bytes"),
        (b'{"a": {}, "a": {}}', 'key "a" twice'),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 100 levels"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}', "broken header entry"),
        (json.dumps({"a": {"dtype": "F32", "shape": [0] * 80, "data_offsets": [0, 0]}}).encode(), "cannot be read"),
    ],
)
def test_safetensors_headers_of_odd_content(tmp_path: Path, header: bytes, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    length = 100_000_001 if "100000001" in words else len(header)
    path.write_bytes(length.to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors.*{words}"):
        open_checkpoint(path).read("a")


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ("module.{}".format, r"begins with module\., .*model\.module\.state_dict"),
        ("base_model.model.{}".format, r"begins with base_model\.model\., .*merge_and_unload"),
        ("module.base_model.model.{}".format, r"begins with module\.base_model\.model\., .*model\.module\.state_dict"),
        ("glm.{}".format, r"begins with glm\., .*inner network"),
        (lambda name: name.replace(".weight", ".base_layer.weight"), "under an adapter of peft: .*merge_and_unload"),
        (lambda name: name.removeprefix("transformer."), "lacks transformer.: save the whole"),
        ("{}.weight_scale".format, "quantized weights .int4 or int8."),
        ("{}.absmax".format, "quantized weights .int4 or int8."),
    ],
)
def test_names_of_another_form_are_said_as_what_they_are(
    golden: Path, tmp_path: Path, rename: Callable[[str], str], words: str
) -> None:
    source = golden / "models" / "glm2_tiny"
    tensors = load_file(source / "model.safetensors")
    tensors.pop("transformer.rotary_pos_emb.inv_freq")
    save_file({rename(name): array for name, array in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        check_names_and_shapes(GLMConfig.from_pretrained(source), open_checkpoint(tmp_path / "m.safetensors"))


def test_quantized_weights_without_scales(golden: Path, tmp_path: Path) -> None:
    source = golden / "models" / "glm2_tiny"
    tensors = load_file(source / "model.safetensors")
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    tensors[name] = tensors[name][:, ::2].astype(np.int8)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)quantized weights .int4 or int8."):
        check_names_and_shapes(GLMConfig.from_pretrained(source), open_checkpoint(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 10**9}, "num_layers = 1000000000: must be at most"),
        ({"seq_length": 10**18}, "seq_length = 1000000000000000000: must be at most"),
        ({"layernorm_epsilon": float("inf")}, "layernorm_epsilon = inf"),
        ({"rope_ratio": float("nan")}, "rope_ratio = nan"),
        ({"rope_ratio": 1e-300}, "rope_ratio = 1e-300: must be above 1e-4"),
        ({"eos_token_id": -1}, "eos_token_id = -1: must be an id"),
        ({"position_encoding_2d": True}, "ChatGLM-6B, the first generation"),
        ({"hidden_size": 64.0}, "hidden_size = 64.0: expected int"),
    ],
)
def test_configs_that_cannot_be_meant(golden: Path, tmp_path: Path, values: dict, words: str) -> None:
    config = json.loads((golden / "models" / "glm2_tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        GLMConfig.from_pretrained(tmp_path)
