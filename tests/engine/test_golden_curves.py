"""Training against the reference: losses, gradient norms, learning rates and final weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from engine_helpers import CONFIGS, TRAIN_RECORDS, curve, read_jsonl
from marks import slow_unless
from mindspore import Tensor
from reference import FOLDER, fresh_golden_model
from tolerances import BF16_GRAD_NORM, BF16_LOSS, GRAD_NORM, LOGITS, LOSS, LOSS_CURVE, WEIGHT_NORM

from glm_ms import GLMConfig, load_pretrained
from glm_ms.convert.names import to_glm_name
from glm_ms.generation import GLMForCausalLM
from glm_ms.settings import load_settings

TRAIN = FOLDER.parent / "train"
COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
FLOAT32_EPS = float(np.finfo(np.float32).eps)
NUM_STEPS, ROWS_PER_BATCH, SEQ_LENGTH = 8, 2, 24


@cache
def golden_case(case: str) -> dict[str, Any]:
    return json.loads((TRAIN / "curves.json").read_text(encoding="utf-8"))["cases"][case]


@cache
def golden_batches(case: str) -> list[dict[str, np.ndarray]]:
    """The batch of each step, int32 [2, 24] each."""
    batches = np.load(TRAIN / golden_case(case)["batches"])
    return [{name: batches[name][i].astype(np.int32) for name in COLUMNS} for i in range(NUM_STEPS)]


def model_name(case: str) -> str:
    return golden_case(case)["model"].split("/")[1]


def check_curve(case: str, losses: list[float], norms: list[float], rates: list[float]) -> None:
    expected = golden_case(case)
    np.testing.assert_allclose(losses, expected["losses"], **LOSS_CURVE)
    np.testing.assert_allclose(norms, expected["grad_norms_before_clip"], **GRAD_NORM)
    np.testing.assert_allclose(rates, expected["learning_rates"], rtol=FLOAT32_EPS * 4, atol=0)


def check_outputs(case: str, model: GLMForCausalLM) -> None:
    """Loss and logits of the trained network on the first batch."""
    batch = golden_batches(case)[0]
    loss = model(batch["input_ids"], batch["attention_mask"], batch["position_ids"], labels=batch["labels"])
    np.testing.assert_allclose(loss.asnumpy(), golden_case(case)["loss_batch0_after"], **LOSS)
    logits = model(batch["input_ids"], batch["attention_mask"], batch["position_ids"]).asnumpy()
    expected = np.load(TRAIN / f"{case}_final_logits_batch0.npz")
    np.testing.assert_allclose(logits[:, -1], expected["logits_last"], **LOGITS)
    np.testing.assert_allclose(logits[0], expected["logits_row0"], **LOGITS)


def zero_gradient_key_bias(config: GLMConfig) -> np.ndarray:
    """Entries of the qkv bias whose gradient is zero but for rounding: the half of each key head that is not
    turned. AdamW steps along the rounding, so their trained values mean nothing."""
    keys = np.zeros((config.num_kv_heads, config.kv_channels), bool)
    keys[:, config.rotary_dim :] = True
    mask = np.zeros(config.qkv_size, bool)
    mask[config.query_size : config.query_size + keys.size] = keys.ravel()
    return mask


def check_weights(case: str, model: GLMForCausalLM) -> None:
    expected, parameters = golden_case(case), model.parameters()
    assert {to_glm_name(name) for name in expected["final_l2_norm"]} == set(parameters)
    for name, norm in expected["final_l2_norm"].items():
        weights = parameters[to_glm_name(name)].asnumpy().astype(np.float64)
        if name in expected["final_l2_norm_without_zero_grad_key_bias"]:
            norm = expected["final_l2_norm_without_zero_grad_key_bias"][name]
            weights = weights[~zero_gradient_key_bias(model.config)]
        else:
            # A sum cancels; its rounding is that of the terms, whose size the norm gives.
            total = expected["final_sum"][name]
            room = WEIGHT_NORM["rtol"] * max(abs(total), norm)
            assert abs(weights.sum() - total) <= room, name
        np.testing.assert_allclose(np.linalg.norm(weights), norm, err_msg=name, **WEIGHT_NORM)


def learning_rate(case: str) -> Any:
    from mindformers.core.lr import LinearWithWarmUpLR

    optimizer = golden_case(case)["optimizer"]
    schedule = optimizer["linear_schedule_warmup_total"]
    if schedule is None:
        return optimizer["lr"]
    return LinearWithWarmUpLR(learning_rate=optimizer["lr"], warmup_steps=schedule[0], total_steps=schedule[1])


# The other cases go through the Trainer below, with the same step and optimizer.
@pytest.mark.parametrize(
    "case",
    slow_unless(["full_ft", "full_ft_clip"], ["full_ft", "full_ft_clip", "full_ft_linear", "full_ft_glm3_left_padded"]),
)
def test_step_and_optimizer(case: str) -> None:
    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep

    ms.set_context(mode=ms.GRAPH_MODE)
    wanted = golden_case(case)["optimizer"]
    model = fresh_golden_model(model_name(case))
    network = TrainingNetwork(model.network, SEQ_LENGTH)
    optimizer = GLMAdamW(
        network.trainable_params(), learning_rate(case), wanted["betas"], wanted["eps"], wanted["weight_decay"]
    )
    step = GLMTrainOneStep(network, optimizer, wanted["clip_global_norm"])
    step.set_train()
    results = []
    for batch in golden_batches(case):
        values = [float(value.asnumpy()) for value in step(*(Tensor(batch[name]) for name in COLUMNS))]
        assert values[3] == np.count_nonzero(batch["labels"][:, 1:] != -100)
        results.append(values)
    losses, norms, rates, _ = (list(column) for column in zip(*results))
    check_curve(case, losses, norms, rates)
    model.network.set_train(False)
    check_outputs(case, model)
    check_weights(case, model)


def test_products_of_bfloat16_change_the_curve_little() -> None:
    """The curve of float32 within the rounding of operands to 8 bits."""
    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep
    from glm_ms.ops.registry import step_kernel

    if step_kernel("bfloat16 product") is None:
        pytest.skip("no C++ kernels, or no oneDNN")
    ms.set_context(mode=ms.GRAPH_MODE)
    case = "full_ft_clip"
    expected = golden_case(case)
    model = fresh_golden_model(model_name(case))
    network = TrainingNetwork(model.network, SEQ_LENGTH, bfloat16=True)
    optimizer = GLMAdamW(
        network.trainable_params(), learning_rate(case), expected["optimizer"]["betas"], expected["optimizer"]["eps"],
        expected["optimizer"]["weight_decay"]
    )  # fmt: skip
    step = GLMTrainOneStep(network, optimizer, expected["optimizer"]["clip_global_norm"])
    step.set_train()
    results = np.array(
        [
            [float(value.asnumpy()) for value in step(*(Tensor(batch[name]) for name in COLUMNS))]
            for batch in golden_batches(case)
        ]
    )
    np.testing.assert_allclose(results[:, 0], expected["losses"], rtol=BF16_LOSS)
    np.testing.assert_allclose(results[:, 1], expected["grad_norms_before_clip"], rtol=BF16_GRAD_NORM)
    assert not np.allclose(results[:, 0], expected["losses"], rtol=1e-6, atol=0)
    assert all(weight.dtype == ms.float32 for weight in network.trainable_params())


class GoldenRows:
    """The rows of the golden batches in place of those of a file of records."""

    seq_length = SEQ_LENGTH

    def __init__(self, case: str) -> None:
        self._batches = golden_batches(case)

    def __len__(self) -> int:
        return NUM_STEPS * ROWS_PER_BATCH

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(index, ROWS_PER_BATCH)
        return {name: self._batches[batch][name][row] for name in COLUMNS}

    def describe(self) -> str:
        return "golden rows"


def golden_settings(case: str, vocabulary: Path, output_dir: Path, batch_size: int, accumulation_steps: int) -> Any:
    wanted = golden_case(case)["optimizer"]
    sizes = GLMConfig.from_pretrained(FOLDER / model_name(case)).to_dict()
    schedule, clip = wanted["linear_schedule_warmup_total"], wanted["clip_global_norm"]
    overrides = [f"model.model_config.{name}={value}" for name, value in sizes.items() if name != "seq_length"]
    overrides += [
        f"model.model_config.seq_length={SEQ_LENGTH}", "train_dataset.max_source_length=16",
        f"train_dataset.max_target_length={SEQ_LENGTH - 17}", "train_dataset.data_loader.shuffle=False",
        f"processor.tokenizer.vocab_file={vocabulary}", f"train_dataset.data_loader.dataset_dir={TRAIN_RECORDS}",
        f"load_checkpoint={FOLDER / model_name(case)}", f"output_dir={output_dir}",
        f"runner_config.batch_size={batch_size}", "runner_config.epochs=1",
        f"runner_config.gradient_accumulation_steps={accumulation_steps}",
        f"runner_wrapper.use_clip_grad={clip is not None}", f"runner_wrapper.max_grad_norm={clip or 1.0}",
        f"optimizer.betas={wanted['betas']}", f"optimizer.eps={wanted['eps']:.9f}",
        f"optimizer.weight_decay={wanted['weight_decay']}", f"lr_schedule.learning_rate={wanted['lr']}",
        f"lr_schedule.type={'LinearWithWarmUpLR' if schedule else 'ConstantWarmUpLR'}",
        f"lr_schedule.warmup_steps={schedule[0] if schedule else 0}", "lr_schedule.warmup_ratio=null",
    ]  # fmt: skip
    config = CONFIGS / "tiny" / "finetune_glm3_tiny.yaml"
    return load_settings(config, overrides, check_files=False)


@pytest.mark.parametrize(
    ("case", "batch_size", "accumulation_steps"),
    [
        ("full_ft_glm3_left_padded", 2, 1),
        ("full_ft_linear", 1, 2),
        pytest.param("full_ft_clip", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_mindformers_trainer(
    case: str,
    batch_size: int,
    accumulation_steps: int,
    vocabulary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same through the Trainer of MindFormers. A batch in two parts gives the same: the loss is the mean
    over the labelled tokens of both, of which they have different numbers."""
    from glm_ms.engine import train as module
    from glm_ms.engine.train import set_device

    settings = golden_settings(case, vocabulary, tmp_path, batch_size, accumulation_steps)
    monkeypatch.setattr(module, "labelled_rows", lambda *_: GoldenRows(case))
    set_device(settings)  # or MindFormers would choose the mode of this process
    last = module.train(settings, SimpleNamespace(vocab_size=512), lambda _: None)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert last.loss == lines[-1]["loss"]
    check_curve(case, *([line[name] for line in lines] for name in ("loss", "grad_norm", "learning_rate")))
    assert curve(tmp_path)[-1]["epoch"] == 1
    trained = load_pretrained(tmp_path)
    check_outputs(case, trained)
    check_weights(case, trained)
