"""Training steps and a generation of a two-layer network against numbers of the reference implementation."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.network import TrainingNetwork
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.generation import GLMForCausalLM
from glm_ms.kernels.compare import DEVICE_ERRORS, EPS
from glm_ms.model.config import GLMConfig
from glm_ms.ops.registry import fuse_kernels
from glm_ms.pretrained import load_pretrained
from glm_ms.selfcheck.rows import Numbers, Row, guarded

MODEL, CURVE = "glm2_tiny", "full_ft"
_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
_STEPS = 3
# float32: from tests/golden/README.md.
_LOSS_DIFFERENCE, _NORM_DIFFERENCE = 1e-4, 1e-4
# On a CPU float16 differs by 4e-5 of the loss, 1/25 of its eps; other devices sum in another order.
_HALF_LOSS_EPS = 0.5


def golden_rows(golden: Path, dtype: str, fused: bool) -> Iterator[Row]:
    """Losses and gradient norm of three steps of finetuning, then 16 greedy tokens, computed in `dtype` with float32
    weights; `golden` is tests/golden of the repository."""
    kernels = "fused" if fused else "portable"
    names = [f"{kernels} training: {name}" for name in ("loss", "gradient")]
    try:
        yield from _training_rows(golden, dtype, fused, names)
    except DEVICE_ERRORS as error:
        yield Row(names[0], "2 layers", dtype, message=f"{type(error).__name__}: {error}")
    name = f"{kernels} generation: tokens"
    yield guarded(name, "2 layers, 2x16", dtype, partial(_generation, golden, dtype, fused))


def _model(golden: Path, dtype: str, fused: bool) -> GLMForCausalLM:
    folder = golden / "models" / MODEL
    config = GLMConfig.from_pretrained(folder)
    model = load_pretrained(folder, dataclasses.replace(config, param_init_type="float32", compute_dtype=dtype))
    if fused:
        fuse_kernels(model.network, getattr(ms, dtype))
    return model


def _training_rows(golden: Path, dtype: str, fused: bool, names: list[str]) -> list[Row]:
    curve = json.loads((golden / "train" / "curves.json").read_text(encoding="utf-8"))["cases"][CURVE]
    batches = np.load(golden / "train" / curve["batches"])
    rows, length = batches["input_ids"].shape[1:]
    network = TrainingNetwork(_model(golden, dtype, fused).network, length)
    wanted = curve["optimizer"]
    options = (wanted[key] for key in ("lr", "betas", "eps", "weight_decay"))
    optimizer = GLMAdamW(network.trainable_params(), *options)
    step = GLMTrainOneStep(network, optimizer, wanted["clip_global_norm"])
    step.set_train()
    results, elapsed = [], 0.0
    for i in range(_STEPS):
        start = time.perf_counter()
        values = step(*(Tensor(batches[name][i].astype(np.int32)) for name in _COLUMNS))
        results.append([float(value.asnumpy()) for value in values[:2]])
        elapsed = (time.perf_counter() - start) * 1e3  # of the last step: the first one compiles
    found = np.array(results)
    losses, norms = (np.array(curve[name][:_STEPS]) for name in ("losses", "grad_norms_before_clip"))
    times = (elapsed, None) if fused else (None, elapsed)
    shape = f"2 layers, {rows}x{length}, {_STEPS} steps"
    allowed = _LOSS_DIFFERENCE if dtype == "float32" else float(_HALF_LOSS_EPS * EPS[dtype] * losses.max())
    table = [Row(names[0], shape, dtype, float(np.abs(found[:, 0] - losses).max()), allowed, *times)]
    if dtype == "float32":
        difference = float(np.abs(found[:, 1] - norms).max())
        table.append(Row(names[1], shape, dtype, difference, float(_NORM_DIFFERENCE * norms.max()), *times))
    return table


def _generation(golden: Path, dtype: str, fused: bool) -> Numbers:
    numbers = np.load(golden / "models" / MODEL / "golden.npz")
    ids, mask, sequences = (numbers[key] for key in ("input_ids", "attention_mask", "greedy_sequences"))
    new = sequences.shape[1] - ids.shape[1]
    model = _model(golden, dtype, fused)
    elapsed = 0.0
    for _ in range(2):  # the first one compiles
        start = time.perf_counter()
        found = model.generate(ids, mask, max_new_tokens=new, eos_token_id=[])
        elapsed = (time.perf_counter() - start) / new * 1e3
    differing = np.count_nonzero(np.array([row[-new:] for row in found]) != sequences[:, -new:])
    return (float(differing), 0.0, *((elapsed, None) if fused else (None, elapsed)))
