"""Checkpoints that MindFormers makes of LoRA and P-Tuning: with their base in one file, or alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, save_checkpoint
from reference import FOLDER, golden_weights
from safetensors.numpy import load_file, save_file

from glm_ms import load_pretrained
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.reader import check_names_and_shapes, open_checkpoint
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.peft.adapter import AdapterError, read_adapter
from glm_ms.storage.errors import CheckpointError
from tools.convert_weight import main as convert
from tools.merge_lora import main as merge

BASE = FOLDER / "glm2_tiny"
LORA = FOLDER.parent / "train" / "lora" / "final"
PREFIX = FOLDER.parent / "train" / "ptuning_v2_proj" / "final.safetensors"
ALPHA = json.loads((LORA / "adapter_config.json").read_text())["lora_alpha"]
IDS = np.random.default_rng(3).integers(0, 512, (2, 20))
# Parts of names here -> those of MindFormers.
NAMES = {
    "transformer.prefix_encoder.embedding.weight": "prefix_encoder.mindpet_delta_ptuning2_embedding.embedding_table",
    "transformer.prefix_encoder.trans.0": "prefix_encoder.mindpet_delta_ptuning2_dense_in",
    "transformer.prefix_encoder.trans.2": "prefix_encoder.mindpet_delta_ptuning2_dense_out",
    "base_model.model.": "",
    "lora_A.weight": "mindpet_delta_lora_a",
    "lora_B.weight": "mindpet_delta_lora_b",
}


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    """The tensors of an adapter under MindFormers' names."""
    stored = load_file(LORA / "adapter_model.safetensors" if kind == "lora" else PREFIX)
    found = {}
    for name, tensor in stored.items():
        for here, there in NAMES.items():
            name = name.replace(here, there)
        found[name] = tensor
    return found if kind == "lora" else {**found, "prefix_encoder.mindpet_delta_ptuning2_prefix": np.arange(8)}


def write(path: Path, *groups: dict[str, np.ndarray]) -> Path:
    """A MindSpore checkpoint, with the counters that a training leaves in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    tensors["global_step"] = np.array(7, np.int32)
    save_checkpoint([{"name": name, "data": Tensor(tensor)} for name, tensor in tensors.items()], str(path))
    return path


def assert_same_adapter(path: Path, kind: str, **options: float) -> None:
    stored = read_adapter(path, **options)
    reference = read_adapter(LORA if kind == "lora" else PREFIX)
    assert {**vars(stored.config), "target_modules": 0, "dropout": 0} == {
        **vars(reference.config), "target_modules": 0, "dropout": 0,
    } or kind == "ptuning2"  # fmt: skip
    assert stored.tensors.keys() == reference.tensors.keys()
    for name, tensor in reference.tensors.items():
        np.testing.assert_array_equal(stored.tensors[name], tensor)


@pytest.mark.parametrize("kind", ["lora", "ptuning2"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_tensors_are_found(kind: str, whole: bool, tmp_path: Path) -> None:
    options = {"lora_alpha": ALPHA} if kind == "lora" else {}
    base = golden_weights("glm2_tiny") if whole else {}
    path = write(tmp_path / "out" / "checkpoint" / "rank_0" / "glm-1_7.ckpt", base, tensors_of(kind))
    for place in (path, path.parent, path.parent.parent, tmp_path / "out"):
        assert_same_adapter(place, kind, **options)
    assert read_adapter(path, **options).weights_beside == len(base)
    upper = {
        name.replace("_lora_a", "_lora_A").replace("_lora_b", "_lora_B"): t for name, t in tensors_of(kind).items()
    }
    assert_same_adapter(write(tmp_path / "upper.ckpt", base, upper), kind, **options)


def test_the_scale_is_asked_for(tmp_path: Path) -> None:
    """MindFormers 1.5 writes it into its output folder; earlier versions write it nowhere."""
    path = write(tmp_path / "checkpoint" / "rank_0" / "glm.ckpt", tensors_of("lora"))
    with pytest.raises(AdapterError, match=r"the scale of the adapter is not known.*lora_alpha=ALPHA"):
        read_adapter(path)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": ALPHA, "target_modules": [".*query_key_value"],
              "base_model_name_or_path": "none", "bias": "none", "lora_bias": False, "lora_dropout": 0.1}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": read_adapter(LORA).config.rank}))
    assert_same_adapter(path, "lora")
    with pytest.raises(AdapterError, match="but lora_alpha=5 was given"):
        read_adapter(path, lora_alpha=5)
    with pytest.raises(AdapterError, match=r"lora_alpha=\S+ was given, but this is a ptuning2 adapter"):
        read_adapter(PREFIX, lora_alpha=5)


def test_what_is_beside_an_adapter_must_be_a_base(tmp_path: Path) -> None:
    foreign = {"lm_head.weight": np.zeros((2, 2), np.float32)}
    for groups in ((foreign,), (golden_weights("glm2_tiny"), foreign)):
        path = write(tmp_path / "glm.ckpt", *groups, tensors_of("lora"))
        with pytest.raises(AdapterError, match=r"1 tensors are not of a lora adapter: lm_head\.weight"):
            read_adapter(path, lora_alpha=ALPHA)


def test_merging_and_converting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint = write(tmp_path / "joint.ckpt", golden_weights("glm2_tiny"), tensors_of("lora"))
    alone = write(tmp_path / "alone.ckpt", tensors_of("lora"))
    common = ["--config", str(BASE)]
    assert merge(["--base", str(BASE), "--adapter", str(LORA), "--output", str(tmp_path / "a.safetensors")]) == 0
    scale = ["--lora_alpha", str(ALPHA)]
    for name, base, adapter in (("b", joint, joint), ("c", BASE, alone), ("d", BASE, joint)):
        output = tmp_path / f"{name}.safetensors"
        line = ["--base", str(base), "--adapter", str(adapter), "--output", str(output), *common, *scale]
        assert merge(line) == 0, capsys.readouterr().err
        merged, expected = load_file(output), load_file(tmp_path / "a.safetensors")
        assert merged.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(merged[key], tensor)
    capsys.readouterr()
    other = ["--base", str(joint), "--adapter", str(LORA), "--output", str(tmp_path / "e.safetensors"), *common]
    assert merge(other) == 0
    assert f"{joint} contains an adapter too; {LORA} is used in its place" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"joint\.ckpt: contains weights and an adapter .*merge_lora\.py"):
        plan_conversion(joint, tmp_path / "f", config=BASE)
    with pytest.raises(CheckpointError, match=r"alone\.ckpt: contains an adapter, not weights"):
        plan_conversion(alone, tmp_path / "f", config=BASE)
    line = ["--config", str(BASE), "--without_adapter", "--output"]
    assert convert(["--input", str(joint), *line, str(tmp_path / "base.safetensors")]) == 0
    assert f"left out {len(tensors_of('lora'))} tensors of an adapter" in capsys.readouterr().out
    assert load_file(tmp_path / "base.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    assert convert(["--input", str(BASE), *line, str(tmp_path / "again.safetensors")]) == 1
    assert "--without_adapter: there is no adapter beside the weights" in capsys.readouterr().err
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("alpha", [1e29, 0.0, -1.0, float("nan"), True, "32"])
def test_a_scale_that_cannot_be_meant(alpha: object, tmp_path: Path) -> None:
    alone = write(tmp_path / "alone.ckpt", tensors_of("lora"))
    with pytest.raises(AdapterError, match="must be a number above 0 and at most 1e\\+06"):
        read_adapter(alone, lora_alpha=alpha)


def prefixed_folder(folder: Path) -> Path:
    """What the original P-Tuning code saves if it saves everything: prefix and model in one folder."""
    config = json.loads((BASE / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "pre_seq_len": 8, "prefix_projection": True}))
    save_file({**load_file(BASE / "model.safetensors"), **load_file(PREFIX)}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_weights_with_an_adapter_get_it(tmp_path: Path) -> None:
    """In one go, as with base and adapter named apart."""
    lora = write(tmp_path / "glm.ckpt", golden_weights("glm2_tiny"), tensors_of("lora"))
    expected = {
        "lora": load_pretrained(BASE, adapter=LORA)(IDS).asnumpy(),
        "ptuning2": load_pretrained(BASE, adapter=PREFIX)(IDS).asnumpy(),
    }
    folder = prefixed_folder(tmp_path / "prefixed")
    models = {
        "lora": load_pretrained(lora, BASE, lora_alpha=ALPHA),
        "ptuning2": load_pretrained(folder, adapter=folder),
    }
    for kind, model in models.items():
        assert model.adapter is not None
        np.testing.assert_array_equal(model(IDS).asnumpy(), expected[kind])
    with pytest.raises(AdapterError, match="the scale of the adapter is not known"):
        load_pretrained(lora, BASE)
    replaced = load_pretrained(folder, adapter=LORA)
    np.testing.assert_array_equal(replaced(IDS).asnumpy(), expected["lora"])


def test_a_config_with_a_prefix_needs_the_prefix(tmp_path: Path) -> None:
    folder = prefixed_folder(tmp_path / "prefixed")
    check_names_and_shapes(GLMConfig.from_pretrained(folder, with_prefix=True), open_checkpoint(folder), True)
    with pytest.raises(CheckpointError, match="contains weights and an adapter"):
        check_names_and_shapes(GLMConfig.from_pretrained(BASE), open_checkpoint(folder))
    shutil.copy(BASE / "model.safetensors", folder)
    with pytest.raises(ConfigError, match="pre_seq_len is set"):
        load_pretrained(folder)
