"""LoRA and P-Tuning v2 against the reference: logits, gradients, curves, trained adapters, generation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import Tensor
from reference import FOLDER, fresh_golden_model
from tolerances import ADAPTER, GRAD_NORM, LOGITS, LOSS, LOSS_CURVE, WEIGHT_NORM

from glm_ms.generation import GLMForCausalLM
from glm_ms.peft.adapter import read_adapter

TRAIN = FOLDER.parent / "train"
LORA = ("lora", "lora_glm3_left_padded")
PREFIX = ("ptuning_v2", "ptuning_v2_proj", "ptuning_v2_glm3_left_padded")
ROWS = ("input_ids", "attention_mask", "position_ids")


@cache
def golden_case(case: str) -> dict[str, Any]:
    return json.loads((TRAIN / "curves.json").read_text(encoding="utf-8"))["cases"][case]


def adapter_path(case: str, moment: str) -> Path:
    """init or final."""
    return TRAIN / golden_case(case)[moment]


def batch(case: str, step: int) -> dict[str, np.ndarray]:
    batches = np.load(TRAIN / golden_case(case)["batches"])
    return {name: batches[name][step].astype(np.int32) for name in (*ROWS, "labels")}


def adapted(case: str, moment: str) -> GLMForCausalLM:
    model = fresh_golden_model(golden_case(case)["model"].split("/")[1])
    model.load_adapter(adapter_path(case, moment))
    return model


def logits_of(model: GLMForCausalLM, case: str) -> np.ndarray:
    rows = batch(case, 0)
    return model(*(rows[name] for name in ROWS)).asnumpy()


@pytest.mark.parametrize("case", slow_unless([], LORA))
def test_lora_logits_at_the_start(case: str) -> None:
    expected = np.load(TRAIN / case / "init_logits_batch0.npz")["logits"]
    np.testing.assert_allclose(logits_of(adapted(case, "init"), case), expected, **LOGITS)


@pytest.mark.parametrize("case", slow_unless(["ptuning_v2_proj"], PREFIX))
def test_prefix_and_logits_at_the_start(case: str) -> None:
    golden, model = np.load(TRAIN / case / "golden.npz"), adapted(case, "init")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        layers = model.network.transformer.prefix_encoder(2, None)
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    for place, name in ((0, "layer0"), (-1, "last")):
        for part, kind in enumerate(("key", "value")):
            expected = golden[f"prefix_{kind}_{name}"]
            for row in layers[place][part].asnumpy():
                np.testing.assert_allclose(row, expected, **LOGITS)
    np.testing.assert_allclose(logits_of(model, case), golden["init_logits"], **LOGITS)


@pytest.mark.parametrize("case", slow_unless(["ptuning_v2_glm3_left_padded"], PREFIX))
def test_generation_with_a_trained_prefix(case: str) -> None:
    golden, model = np.load(TRAIN / case / "golden.npz"), adapted(case, "final")
    prompts = [golden[f"gen_{name}"] for name in ROWS]
    new = golden["greedy_sequences"].shape[1] - prompts[0].shape[1]
    found = model.generate(*prompts, max_new_tokens=new, eos_token_id=[])
    assert [row[-new:] for row in found] == golden["greedy_sequences"][:, -new:].tolist()
    np.testing.assert_allclose(model(*prompts).asnumpy()[:, -1], golden["greedy_logits_step0"], **LOGITS)


@pytest.mark.slow
def test_a_prefix_serves_beams_and_calls_of_other_sizes() -> None:
    """Cached decoding gives what decoding without a cache would: prefix slots are in every sequence of every cache."""
    model = adapted("ptuning_v2", "final")
    prompts = [[5, 17, 301, 44], [9, 250]]
    for sequence in model.generate(prompts, max_new_tokens=5, eos_token_id=[]):
        without_cache = model(sequence[:-1]).asnumpy()[0].argmax(axis=-1)
        assert without_cache[-5:].tolist() == sequence[-5:]
    single = model.generate(prompts[0], max_new_tokens=4, num_beams=3, num_return_sequences=3, eos_token_id=[])
    both = model.generate(prompts, max_new_tokens=4, num_beams=3, num_return_sequences=3, eos_token_id=[])
    assert both[:3] == single


@pytest.mark.parametrize("case", slow_unless(("lora_glm3_left_padded", "ptuning_v2_proj"), [*LORA, *PREFIX]))
def test_training_curve_and_trained_adapter(case: str, tmp_path: Path) -> None:
    from glm_ms.engine.batches import COLUMNS
    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep

    expected, model = golden_case(case), adapted(case, "init")
    wanted = expected["optimizer"]
    base = {name: parameter.asnumpy().copy() for name, parameter in model.parameters().items()}
    network = TrainingNetwork(model.network, batch(case, 0)["input_ids"].shape[1])
    trained = network.trainable_params()
    assert {id(p) for p in trained} == {id(p) for p in model.adapter.parameters()}
    optimizer = GLMAdamW(trained, wanted["lr"], wanted["betas"], wanted["eps"], wanted["weight_decay"])
    step = GLMTrainOneStep(network, optimizer, wanted["clip_global_norm"])
    step.set_train()
    losses, norms = [], []
    for number in range(len(expected["losses"])):
        rows = {**batch(case, number), "dropout_seeds": np.zeros(2, np.int32)}
        loss, norm = step(*(Tensor(rows[name]) for name in COLUMNS))[:2]
        losses.append(float(loss.asnumpy()))
        norms.append(float(norm.asnumpy()))
    np.testing.assert_allclose(losses, expected["losses"], **LOSS_CURVE)
    np.testing.assert_allclose(norms, expected["grad_norms_before_clip"], **GRAD_NORM)
    check_trained(case, model, tmp_path)
    for name, parameter in model.parameters().items():
        assert np.array_equal(parameter.asnumpy(), base[name]), name


def check_trained(case: str, model: GLMForCausalLM, tmp_path: Path) -> None:
    """Saved tensors by name, norms, loss and logits after training."""
    expected = golden_case(case)
    model.adapter.save(tmp_path)
    saved, reference = read_adapter(tmp_path), read_adapter(adapter_path(case, "final"))
    assert set(saved.tensors) == set(reference.tensors)
    for name, tensor in reference.tensors.items():
        np.testing.assert_allclose(saved.tensors[name], tensor, err_msg=name, **ADAPTER)
    for name, norm in expected["final_l2_norm"].items():
        tensor = next(t for ours, t in saved.tensors.items() if ours in name or name in ours)
        np.testing.assert_allclose(np.linalg.norm(tensor.astype(np.float64)), norm, **WEIGHT_NORM)
    rows = batch(case, 0)
    loss = model(*(rows[name] for name in ROWS), labels=rows["labels"]).asnumpy()
    np.testing.assert_allclose(loss, expected["loss_batch0_after"], **LOSS)
    final = np.load(TRAIN / f"{case}_final_logits_batch0.npz")
    logits = logits_of(model, case)
    np.testing.assert_allclose(logits[:, -1], final["logits_last"], **LOGITS)
    np.testing.assert_allclose(logits[0], final["logits_row0"], **LOGITS)
