"""The inputs of layers against an independent NumPy network; `glm-ms quantize --calibration`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import load_script
from marks import slow_unless
from numpy_glm import NumpyGLM
from reference import CASES, FOLDER, golden_weights

from glm_ms.commands import main as glm_ms
from glm_ms.convert.reader import open_checkpoint
from glm_ms.model.config import GLMConfig
from glm_ms.ops.packing import Packed, dequantise
from glm_ms.quant.calibration import Calibration
from glm_ms.quant.compensation import Inputs
from glm_ms.tokenizer import ChatGLM3Tokenizer

LAYER = "transformer.encoder.layers.0.mlp.dense_4h_to_h"


class Recorder(NumpyGLM):
    """Keeps the inputs of every linear layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.inputs: dict[str, list[np.ndarray]] = {}

    def linear(self, x, name):
        self.inputs.setdefault(name, []).append(x[0])
        return super().linear(x, name)


def rows(lengths: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(generator.integers(1, 400, length), np.arange(length)) for length in lengths]


def recorded(case: str, texts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Layer -> its inputs [tokens, in], by the NumPy network."""
    network = Recorder(FOLDER / case)
    for ids, positions in texts:
        network.logits(ids[None], np.ones((1, len(ids)), np.int32), positions[None])
    return {name: np.concatenate(parts) for name, parts in network.inputs.items()}


@pytest.mark.parametrize("case", slow_unless(["glm3_tiny"], CASES))
def test_inputs_are_those_of_the_network(case: str) -> None:
    texts = rows((5, 12, 9, 40))
    with open_checkpoint(FOLDER / case) as reader:
        calibration = Calibration(reader, GLMConfig.from_pretrained(FOLDER / case), texts)
        for name, x in recorded(case, texts).items():
            found, expected = calibration.inputs_of(name), Inputs.of(x.T @ x / np.float32(len(x)))
            np.testing.assert_allclose(found.importance, expected.importance, rtol=5e-3, err_msg=name)
            lower = [np.tril(factor.lower) * np.sqrt(factor.importance) for factor in (found, expected)]
            np.testing.assert_allclose(*lower, rtol=0, atol=2e-3 * np.abs(lower[1]).max(), err_msg=name)
        with pytest.raises(KeyError, match=r"layers\.0"):
            calibration.inputs_of(LAYER)


def quantized_layer(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    with open_checkpoint(folder) as reader:
        data, scale = reader.read(f"{LAYER}.quantized.weight"), reader.read(f"{LAYER}.quantized.scale")
    return dequantise(Packed(data, scale, shape, 32))


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A vocabulary that fits the 512 rows of the golden models."""
    tool = load_script("tools/train_vocab.py")
    path = tmp_path / "tokenizer.model"
    tool.write_whole(path, tool.train_vocabulary(["a bag of blue silk", "the red coat is warm"] * 20, 330))
    return path


def test_calibration_lowers_the_error_of_results(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the records to the file, measured on the inputs that those records give."""
    model, records = FOLDER / "glm3_tiny", tmp_path / "records.jsonl"
    texts = [{"content": "blue silk bag", "summary": "a bag of silk"}, {"content": "coat", "summary": "red and warm"}]
    records.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    arguments = ["quantize", "--model", str(model), "--bits", "4"]
    given = ["--calibration", str(records), "--tokenizer", str(vocabulary), "--model_generation", "3"]
    assert glm_ms([*arguments, "--output", str(tmp_path / "plain")]) == 0
    assert glm_ms([*arguments, "--output", str(tmp_path / "aware"), *given]) == 0
    assert "2 records used" in capsys.readouterr().err
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    ids = [tokenizer.build_chat_input(text["content"])["input_ids"] for text in texts]
    ids = [np.array([*prompt, *tokenizer.encode(text["summary"], add_special_tokens=False)])
           for prompt, text in zip(ids, texts)]  # fmt: skip
    inputs = recorded("glm3_tiny", [(row, np.arange(len(row))) for row in ids])[LAYER]
    weight = golden_weights("glm3_tiny")[f"{LAYER}.weight"]
    errors = {
        name: np.square(inputs @ (quantized_layer(tmp_path / name, weight.shape) - weight).T).mean()
        for name in ("plain", "aware")
    }
    assert errors["aware"] < 0.7 * errors["plain"]


@pytest.mark.parametrize(
    "flag", [["--records", "8"], ["--format", "ADGenDataLoader"], ["--columns", "a", "b"], ["--model_generation", "3"]],
    ids=lambda flag: flag[0],
)  # fmt: skip
def test_options_of_records_need_them(flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["quantize", "--model", str(FOLDER / "glm3_tiny"), "--bits", "8", "--output", str(tmp_path / "out")]
    assert glm_ms([*given, *flag]) == 1
    assert f"{flag[0]}: is for --calibration FILE only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, records = tmp_path / "tokenizer.model", tmp_path / "records.jsonl"
    tool = load_script("tools/train_vocab.py")
    words = [f"{chr(0x4E00 + i)}{chr(0x4E00 + 3 * i)}" for i in range(600)]
    tool.write_whole(tokenizer, tool.train_vocabulary(words, 1400))
    records.write_text(json.dumps({"content": words[550], "summary": words[590]}), encoding="utf-8")
    arguments = ["quantize", "--model", str(FOLDER / "glm3_tiny"), "--bits", "8", "--output", str(tmp_path / "out")]
    given = ["--calibration", str(records), "--tokenizer", str(tokenizer), "--model_generation", "3"]
    assert glm_ms([*arguments, *given]) == 1
    assert "the tokenizer is not that of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
