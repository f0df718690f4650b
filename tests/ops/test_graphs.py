"""Operators of one block in the compiled graphs of a card: casts, copies and reshapes that are not needed show here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from graph_ir import of_a_layer, operators

TESTS = Path(__file__).resolve().parent.parent
RIG = Path(os.environ.get("GLM_MS_SHARED", TESTS.parent.parent / "shared")) / "rig" / "run.sh"
SCRIPT = Path(__file__).resolve().parent / "rig_graphs.py"

# Graph -> operator -> the most that a block may have, in float16. Operators that move or convert numbers, and compute
# nothing: with none of them left out, one more is an error of the network or of a kernel's cell.
# A norm of float16 with a weight of float32 casts twice, see `FusedRMSNormalize`; each weight and bias is cast once.
# RmsNormGrad gives the gradient of a weight in float32, which is cast to the type of the weight.
_MOVES = ("Cast", "Transpose", "Reshape", "StridedSlice", "BroadcastTo", "Gather", "Concat", "StridedSliceGrad")
LIMITS = {
    ("float32", "step"): {"Cast": 9, "Reshape": 13, "StridedSlice": 4},
    ("float16", "step"): {"Reshape": 13, "StridedSlice": 4},
    ("int8", "step"): {"Reshape": 13, "StridedSlice": 4},
    ("int4", "step"): {"Reshape": 13, "StridedSlice": 4},
    ("float32", "prefill"): {"Cast": 9, "Reshape": 11, "StridedSlice": 4},
    ("float16", "prefill"): {"Reshape": 11, "StridedSlice": 4},
    ("float32", "training"): {"Cast": 18, "Reshape": 20, "StridedSlice": 4, "Concat": 1, "StridedSliceGrad": 4},
    ("float16", "training"): {"Cast": 2, "Reshape": 20, "StridedSlice": 4, "Concat": 1, "StridedSliceGrad": 4},
}
# Kernels that must be there, once each.
KERNELS = {
    "step": ("PagedAttention", "ReshapeAndCache", "RotaryPositionEmbedding"),
    "prefill": ("PagedAttention", "ReshapeAndCache", "RotaryPositionEmbedding"),
    "training": ("FlashAttentionScore", "FlashAttentionScoreGrad", "RotaryPositionEmbedding"),
}

GRAPH = """\
%para1_x: <Tensor[Float32], (2)>
subgraph @net() {
  %0(ValueNode_1$x) = Load(%para2_weight, UMonad[U]) cnode_attrs: {checkpoint: Bool(1)}
  %1(CNode_2$x) = PrimFunc_Cast(%0, I64(42)) {instance name: cast} cnode_attrs: {checkpoint: Bool(1)}
  %2(y) = PrimFunc_MatMul(%para1_x, %1, Bool(0), Bool(1)) {instance name: matmul}
      : (<Tensor[Float32], (2)>) -> (<Tensor[Float32], (2)>)
  #[CNode]PrimFunc_Cast
  %3(CNode_3) = PrimFunc_Cast(%2, I64(43))
  %4(CNode_4) = Depend(%3, %0)
  Return(%4)
}
"""


def test_operators_of_a_graph_file() -> None:
    assert operators(GRAPH) == {"Cast": 2, "MatMul": 1}
    assert of_a_layer(operators(GRAPH), operators(GRAPH + "  %5(y) = PrimFunc_Cast(%4, I64(42))\n")) == {"Cast": 1}


@pytest.mark.slow
@pytest.mark.skipif(not RIG.is_file(), reason=f"no rig: {RIG} (set GLM_MS_SHARED)")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which the rig needs")
def test_a_block_has_no_more_operators_than_it_needs(tmp_path: Path) -> None:
    command = ["bash", RIG, "--target", "ascend", "--ranks", "1", "--out", tmp_path / "out", "--timeout", "300"]
    result = subprocess.run(
        [*map(str, command), "--", str(SCRIPT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = [line.partition(" ")[2] for line in result.stdout.splitlines() if line.startswith("LAYER ")]
    layers = {(weights, graph): counts for weights, graph, counts in map(json.loads, lines)}
    assert layers.keys() == LIMITS.keys()
    for (weights, graph), counts in layers.items():
        moves = {name: counts[name] for name in _MOVES if name in counts}
        limits = LIMITS[weights, graph]
        over = {name: count for name, count in moves.items() if count > limits.get(name, 0)}
        assert not over, f"{graph}, weights {weights}: more than {limits}: {over}"
        assert all(counts[name] == 1 for name in KERNELS[graph]), counts
        assert counts["RmsNorm"] == 2
        if weights.startswith("int"):
            assert counts["WeightQuantBatchMatmul"] == 4
            assert "MatMul" not in counts
