"""Runs over quantized weights: evaluation, adapters, resuming; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import SMALL_TRAINING, run_here, tiny_arguments

from glm_ms import load_pretrained
from glm_ms.commands import main as glm_ms
from glm_ms.ops.cpu.blas import has_blas
from glm_ms.storage.run_folder import SCORES_FILE

LORA = ("model.pet_config.pet_type=lora", "model.pet_config.lora_rank=2")


@pytest.fixture(scope="module")
def base(finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a short training."""
    return finetune(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def int4(base: Path) -> Path:
    """Its weights, quantized."""
    folder = base.parent / "int4"
    assert glm_ms(["quantize", "--model", str(base), "--bits", "4", "--output", str(folder)]) == 0
    return folder


def perplexity(vocabulary: Path, weights: Path, output: Path, *arguments: str) -> float:
    line = tiny_arguments(
        "eval", vocabulary, *SMALL_TRAINING[:4], "--load_checkpoint", weights, "--output_dir", output,
        "metric.type=PerplexityMetric", "eval_dataset.num_samples=4", *arguments
    )  # fmt: skip
    assert run_here(line) == 0
    return json.loads((output / SCORES_FILE).read_text())["perplexity"]


def test_scores_of_quantized_weights(base: Path, int4: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Weights quantized once and while loading score the same; 8 bits are near the original."""
    plain = perplexity(vocabulary, base, tmp_path / "plain")
    int8 = perplexity(vocabulary, base, tmp_path / "int8", "model.quantization_bit=8")
    once = perplexity(vocabulary, int4, tmp_path / "once")
    loading = perplexity(vocabulary, base, tmp_path / "loading", "model.quantization_bit=4")
    assert 0 < abs(int8 / plain - 1) < 1e-3
    assert once == loading
    assert 0 < abs(once / plain - 1) < 2e-2


def test_an_adapter_trains_over_quantized_weights(
    finetune, base: Path, int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = finetune(
        tmp_path / "lora", "--load_checkpoint", int4, *LORA, "model.model_config.compute_dtype=bfloat16"
    )  # fmt: skip
    remark = "has no effect on quantized layers" if has_blas() else "becomes float32 on CPU"
    assert f"compute_dtype: bfloat16 {remark}" in capsys.readouterr().err
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    # An adapter that changes nothing would be refused.
    assert load_pretrained(int4, adapter=output).adapter is not None
    assert load_pretrained(base, adapter=output).adapter is not None


def test_training_that_needs_other_weights_is_refused(
    base: Path, int4: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        line = tiny_arguments("finetune", vocabulary, *SMALL_TRAINING, "--output_dir", tmp_path / "run", *arguments)
        assert run_here(line) != 0
        return capsys.readouterr().err

    assert "has quantized weights, which cannot be trained" in refused("--load_checkpoint", int4)
    message = refused("--load_checkpoint", int4, *LORA, "model.quantization_bit=8")
    assert "quantized already (int4, a scale for 32 inputs), so they cannot become int8" in message
    predict = tiny_arguments("predict", vocabulary, *SMALL_TRAINING[:4], "--load_checkpoint", int4)
    assert run_here([*predict, "--run_mode", "export", "--output_dir", str(tmp_path / "export")]) != 0
    assert "cannot be exported" in capsys.readouterr().err


def test_a_run_continues_with_the_same_bits_only(
    finetune, base: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*LORA, "--load_checkpoint", base)
    output = finetune(tmp_path / "lora", *more, "model.quantization_bit=8", "runner_config.epochs=1")
    line = tiny_arguments(
        "finetune", vocabulary, *SMALL_TRAINING, "--output_dir", output, *more, "runner_config.epochs=1",
        "model.quantization_bit=4", "--resume_training", "True"
    )  # fmt: skip
    assert run_here(line) != 0
    assert "quantization: [8, 0] then, [4, 32] now" in capsys.readouterr().err
