"""A training step computes no gradient that no trained parameter needs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.peft.lora import LoraConfig

CONFIG = GLMConfig(
    num_layers=3, hidden_size=16, ffn_hidden_size=24, kv_channels=4, num_attention_heads=4, padded_vocab_size=40,
    multi_query_group_num=2, seq_length=16
)  # fmt: skip
OPERATOR = re.compile(r"%\d+\([^)]*\) = (?:PrimFunc_)?(\w+)\(")
# Linear layers of a block, and the product that turns queries and keys.
FORWARD = 4 + 1


def operators(folder: Path) -> Counter[str]:
    """How often each operator occurs in the graph that MindSpore runs, which was saved in `folder`. A kernel for output
    layer and loss counts as the two products of an output layer that is not trained."""
    last = max(folder.rglob("*_validate_*.ir"), key=lambda path: path.name).read_text(encoding="utf-8")
    found = Counter(OPERATOR.findall(last))
    found["MatMul"] += 2 * len(re.findall(r'func_name: "[^"]*:glm_ms_op_output_loss_frozen"', last))
    return found


@pytest.mark.slow
def test_products_of_a_step_that_trains_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.engine.step.adamw import GLMAdamW
    from glm_ms.engine.step.network import TrainingNetwork
    from glm_ms.engine.step.train_step import GLMTrainOneStep

    monkeypatch.setenv("MS_DEV_SAVE_GRAPHS", "1")
    monkeypatch.setenv("MS_DEV_SAVE_GRAPHS_PATH", str(tmp_path))
    ms.set_context(mode=ms.GRAPH_MODE)
    model = GLMForCausalLM(CONFIG)
    model.add_adapter(LoraConfig(2, 4.0, 0.0, r".*layers\.1\..*query_key_value"))
    network = TrainingNetwork(model.network, 8)
    step = GLMTrainOneStep(network, GLMAdamW(network.trainable_params(), 1e-3), 1.0)
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    step.compile(*map(Tensor, (ids, ids, np.ones_like(ids), ids % 8)))
    # Block 2 has one product backward for each one forward. Block 1 has none for the inputs of its qkv layer and of A,
    # and two for the gradients of A and B; block 0 has none.
    forward = CONFIG.num_layers * FORWARD + 2 + 1
    backward = 1 + FORWARD + (FORWARD - 1) + 1 + 2
    found = operators(tmp_path)
    assert found["MatMul"] == forward + backward, found
    assert found["BatchMatMul"] == 2 * CONFIG.num_layers + 2 * 4, found
