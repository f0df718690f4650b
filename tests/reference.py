"""The golden models: their names, weights and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.convert.names import expected_shapes, to_glm_name

FOLDER = Path(__file__).resolve().parent / "golden" / "models"
CASES = sorted(path.name for path in FOLDER.iterdir())


def golden_weights(case: str) -> dict[str, np.ndarray]:
    """float32 weights of a golden model by our parameter names."""
    tensors = {to_glm_name(k): v for k, v in load_file(FOLDER / case / "model.safetensors").items()}
    return {name: tensors[name] for name in expected_shapes(GLMConfig.from_pretrained(FOLDER / case))}


@cache
def golden_model(case: str) -> GLMForCausalLM:
    """A golden model, shared by the tests of a process: do not train it."""
    return fresh_golden_model(case)


def fresh_golden_model(case: str) -> GLMForCausalLM:
    """A golden model of one's own."""
    return GLMForCausalLM.from_parameters(GLMConfig.from_pretrained(FOLDER / case), golden_weights(case).items())


@cache
def golden_numbers(case: str) -> dict[str, np.ndarray]:
    """Everything in golden.npz of a model."""
    return dict(np.load(FOLDER / case / "golden.npz"))


@contextmanager
def graph_mode() -> Iterator[None]:
    """Runs cells as compiled graphs inside the block."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)
