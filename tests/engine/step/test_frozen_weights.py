"""A training step computes no gradient that no trained parameter needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from glm_ms.ops.cpu.blas import has_blas
from glm_ms.ops.cpu.library import SWITCH

PROGRAM = Path(__file__).with_name("frozen_step.py")
NUM_LAYERS = 3
OPERATOR = re.compile(r"%\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(")
KERNEL = re.compile(r'func_name: "[^"]*:glm_ms_op_(\w+)"')
# Linear layers of a block, and the product that turns queries and keys.
FORWARD = 4 + 1
# Block 2 has one product backward for each one forward. Block 1 has none for the inputs of its qkv layer and of A,
# and two for the gradients of A and B; block 0 has none. The output layer has one each way.
PRODUCTS = (NUM_LAYERS * FORWARD + 2 + 1) + (1 + FORWARD + (FORWARD - 1) + 1 + 2)


def operators(folder: Path, **variables: str) -> Counter[str]:
    """How often each operator and each kernel of the library occurs in the graph of the step that MindSpore runs."""
    variables = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(folder), **variables}
    subprocess.run([sys.executable, str(PROGRAM)], env={**os.environ, **variables}, check=True, timeout=300)
    last = max(folder.rglob("*_validate_*.ir"), key=lambda path: path.name).read_text(encoding="utf-8")
    return Counter(OPERATOR.findall(last)) + Counter(KERNEL.findall(last))


@pytest.mark.slow
def test_products_of_a_step_that_trains_one_block(tmp_path: Path) -> None:
    found = operators(tmp_path, **{SWITCH: "0"})
    assert found["MatMul"] == PRODUCTS, found
    assert found["BatchMatMul"] == 2 * NUM_LAYERS + 2 * 4, found


@pytest.mark.slow
def test_kernels_of_a_step_that_trains_one_block(tmp_path: Path) -> None:
    if not has_blas():
        pytest.skip("no C++ kernels, or no oneDNN for their products")
    found = operators(tmp_path)
    # Output layer and loss are one kernel with both products of a layer that is not trained. Rotations are no products.
    assert found["output_loss_frozen"] == 1, found
    assert found["MatMul"] == PRODUCTS - 2 - (NUM_LAYERS + 2), found
    assert (found["rotary"], found["rotary_gradient"], found["add_bias"]) == (NUM_LAYERS, 2, NUM_LAYERS), found
    assert (found["packed_attention"], found["packed_attention_gradient"]) == (NUM_LAYERS, 2), found
    assert (found["swiglu"], found["swiglu_gradient"]) == (NUM_LAYERS, 2), found
    # Two norms in a block and the last one; that before the qkv layer of block 1 needs no gradient of its input.
    norms = found["rms_norm"], found["rms_norm_gradient"], found["rms_norm_weight_gradient"]
    assert norms == (2 * NUM_LAYERS + 1, 4, 0), found
