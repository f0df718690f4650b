"""`load_pretrained`: every kind of checkpoint gives the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from reference import CASES, FOLDER, golden_numbers, golden_weights
from tolerances import LOGITS

from glm_ms import GLMConfig, load_pretrained
from glm_ms.storage.errors import CheckpointError

CASE = "glm2_tiny"


def check_logits(path: Path, case: str = CASE, config: object = None, **tolerance: float) -> None:
    numbers = golden_numbers(case)
    logits = load_pretrained(path, config=config)(numbers["input_ids"], numbers["attention_mask"]).asnumpy()
    np.testing.assert_allclose(logits, numbers["logits"], **(tolerance or LOGITS))


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_folder(case: str) -> None:
    check_logits(FOLDER / case, case)


def test_sharded_bin() -> None:
    pytest.importorskip("torch")
    check_logits(FOLDER / CASE / "sharded")


def test_half_precision_shards() -> None:
    pytest.importorskip("torch")
    numbers = golden_numbers("glm3_tiny")
    model = load_pretrained(FOLDER / "glm3_tiny" / "sharded_fp16")
    assert {p.dtype for p in model.parameters().values()} == {ms.float32}  # the CPU's type
    logits = model(numbers["input_ids"], numbers["attention_mask"]).asnumpy()
    # Weights rounded to float16 (relative 5e-4) move logits of size 3 by some 1e-3.
    np.testing.assert_allclose(logits, numbers["logits"], atol=2e-2)


def test_mindspore_ckpt_of_mindspore_itself(tmp_path: Path) -> None:
    entries = [{"name": name, "data": Tensor(value)} for name, value in golden_weights(CASE).items()]
    ms.save_checkpoint(entries, str(tmp_path / "glm.ckpt"))
    check_logits(tmp_path / "glm.ckpt", config=FOLDER / CASE)
    check_logits(tmp_path / "glm.ckpt", config=GLMConfig.from_pretrained(FOLDER / CASE))


def test_embedding_name_of_newer_mindformers(tmp_path: Path) -> None:
    weights = golden_weights(CASE)
    weights["transformer.embedding.embedding_weight"] = weights.pop("transformer.embedding.embedding_table")
    entries = [{"name": name, "data": Tensor(value)} for name, value in weights.items()]
    ms.save_checkpoint(entries, str(tmp_path / "glm.ckpt"))
    check_logits(tmp_path / "glm.ckpt", config=FOLDER / CASE / "config.json")


def test_single_file_needs_a_config(tmp_path: Path) -> None:
    shutil.copy(FOLDER / CASE / "model.safetensors", tmp_path / "glm.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(tmp_path / "glm.safetensors")
    check_logits(tmp_path / "glm.safetensors", config=FOLDER / CASE)


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
