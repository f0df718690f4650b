"""Training through the settings: accumulation, short last steps, what a run shows and leaves."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from data_helpers import adgen_rows
from engine_helpers import TRAIN_RECORDS, curve, read_jsonl
from mindspore import Tensor, ops
from tolerances import GRAD_NORM, LOGITS, LOSS, LOSS_CURVE

from glm_ms import ChatGLM2Tokenizer, ChatGLM3Tokenizer, load_pretrained
from glm_ms.generation import GLMForCausalLM

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
TOKENIZERS = {2: ChatGLM2Tokenizer, 3: ChatGLM3Tokenizer}


def sample_rows(vocabulary: Path, generation: int, indices: list[int]) -> dict[str, np.ndarray]:
    """Training rows of the sample, int32 [rows, 128] each."""
    rows = adgen_rows(TRAIN_RECORDS, TOKENIZERS[generation](vocabulary), max_target_length=63)
    return {name: np.stack([rows[i][name] for i in indices]) for name in COLUMNS}


def loss_of(model: GLMForCausalLM, rows: dict[str, np.ndarray]) -> float:
    loss = model(rows["input_ids"], rows["attention_mask"], rows["position_ids"], labels=rows["labels"])
    return float(loss.asnumpy())


def gradient_norm(model: GLMForCausalLM, rows: dict[str, np.ndarray]) -> float:
    """Of the mean loss over the labelled tokens, by plain differentiation."""
    from glm_ms.engine.step.network import TrainingNetwork

    network = TrainingNetwork(model.network, rows["input_ids"].shape[1])

    def mean_loss(*inputs: Tensor) -> Tensor:
        total, count = network(*inputs)
        return total / count

    gradient = ops.grad(mean_loss, None, ms.ParameterTuple(network.trainable_params()))
    gradients = ms.jit(gradient)(*(Tensor(rows[name]) for name in COLUMNS))
    return float(np.sqrt(sum(np.square(g.asnumpy().astype(np.float64)).sum() for g in gradients)))


@pytest.mark.parametrize("generation", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_accumulation_equals_a_larger_batch(finetune, vocabulary: Path, tmp_path: Path, generation: int) -> None:
    rows = sample_rows(vocabulary, generation, list(range(8)))
    counts = np.count_nonzero(rows["labels"] != -100, axis=1)
    assert len(set(counts.tolist())) > 2  # so that a mean of means would show
    whole = finetune(tmp_path / "whole", "runner_config.batch_size=8", "runner_config.epochs=4", generation=generation)
    parts = finetune(
        tmp_path / "parts", "runner_config.batch_size=2", "runner_config.gradient_accumulation_steps=4",
        "runner_config.epochs=4", generation=generation
    )  # fmt: skip
    one, other = curve(whole), curve(parts)
    assert len(one) == 12
    assert [line["step"] for line in other] == [line["step"] for line in one]
    assert [line["learning_rate"] for line in other] == [line["learning_rate"] for line in one]
    for name, tolerance in (("loss", LOSS_CURVE), ("grad_norm", GRAD_NORM)):
        np.testing.assert_allclose(
            [line[name] for line in other], [line[name] for line in one], err_msg=name, **tolerance
        )
    logits = [load_pretrained(run)(rows["input_ids"], rows["attention_mask"]).asnumpy() for run in (parts, whole)]
    np.testing.assert_allclose(*logits, **LOGITS)


@pytest.mark.parametrize("accumulation_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_filling_rows_leave_the_mean_as_it_is(
    finetune, vocabulary: Path, tmp_path: Path, accumulation_steps: int
) -> None:
    """5 rows in steps of 4: the second step holds one real row; with accumulation its last micro batch
    holds none at all."""
    run = finetune(
        tmp_path, "train_dataset.num_samples=5", "train_dataset.drop_remainder=False",
        "train_dataset.data_loader.shuffle=False", "runner_config.epochs=1", "checkpoint.save_steps=1",
        f"runner_config.batch_size={4 // accumulation_steps}",
        f"runner_config.gradient_accumulation_steps={accumulation_steps}"
    )  # fmt: skip
    lines = curve(run)
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    after_one = load_pretrained(run / "checkpoint" / "step_00000001")
    last_row = sample_rows(vocabulary, 3, [4])
    np.testing.assert_allclose(lines[1]["loss"], loss_of(after_one, last_row), **LOSS)
    np.testing.assert_allclose(lines[1]["grad_norm"], gradient_norm(after_one, last_row), **GRAD_NORM)


def test_graph_mode_in_every_step(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine.callbacks import UpdateCallback

    modes, original = [], UpdateCallback.on_train_step_end

    def recorded(self: UpdateCallback, context: ms.RunContext) -> None:
        modes.append(ms.get_context("mode"))
        original(self, context)

    monkeypatch.setattr(UpdateCallback, "on_train_step_end", recorded)
    finetune(tmp_path, "runner_config.epochs=1")
    assert modes == [ms.GRAPH_MODE] * 6


def test_tokens_per_second_counts_no_padding(finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine.callbacks import UpdateCallback
    from glm_ms.engine.report.progress import ProgressLog

    rates, places, original = [], [], UpdateCallback.on_train_step_end

    def recorded(self: UpdateCallback, context: ms.RunContext) -> None:
        original(self, context)
        rates.append(self.last.tokens_per_second)
        if not places:
            rows = self._run.rows
            places.extend(int(rows[index]["position_ids"].max()) + 1 for index in range(len(rows)))
            assert rows.seq_length > min(places)

    monkeypatch.setattr(UpdateCallback, "on_train_step_end", recorded)
    monkeypatch.setattr(ProgressLog, "seconds", lambda self: 0.5)
    finetune(tmp_path, "runner_config.epochs=1")
    assert len(set(rates)) > 1
    assert sum(rates) == 2 * sum(places)  # an epoch takes every row once


def test_equal_runs_are_equal_to_the_last_digit(finetune, tmp_path: Path) -> None:
    runs = [finetune(tmp_path / name, "runner_config.epochs=1") for name in ("a", "b")]
    assert curve(runs[0]) == curve(runs[1])
    files = [run / "checkpoint" / "step_00000006" / "model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_run_shows_and_leaves(finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboardX")
    run = finetune(tmp_path, "logging.tensorboard=True", "logging.log_steps=5")
    shown = capsys.readouterr()
    assert "24 records used" in shown.err
    assert "weights: random" in shown.err
    bar = shown.err.replace("\r", "\n").splitlines()
    last = next(line for line in reversed(bar) if "12/12" in line)
    for part in ("training: 100%", "loss ", "lr ", "grad norm ", "tokens/s"):
        assert part in last
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 12]  # the last one always
    assert lines[-1]["tokens_per_second"] > 0
    assert f"step 12: loss {lines[-1]['loss']:.6f}" in shown.err
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((run / "checkpoint" / "step_00000012" / "manifest.json").read_text())["step"] == 12
    assert (run / "settings.yaml").is_file()
