"""Compiles a training step of a LoRA adapter in one block of three; MindSpore saves the graphs.

It reads the variables that ask for it once in a process, so this is a program.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.network import TrainingNetwork
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.peft.lora import LoraConfig

CONFIG = GLMConfig(
    num_layers=3, hidden_size=16, ffn_hidden_size=24, kv_channels=4, num_attention_heads=4, padded_vocab_size=40,
    multi_query_group_num=2, seq_length=16
)  # fmt: skip

if __name__ == "__main__":
    ms.set_context(mode=ms.GRAPH_MODE)
    model = GLMForCausalLM(CONFIG)
    model.add_adapter(LoraConfig(2, 4.0, 0.0, r".*layers\.1\..*query_key_value"))
    network = TrainingNetwork(model.network, 8)
    step = GLMTrainOneStep(network, GLMAdamW(network.trainable_params(), 1e-3), 1.0)
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    step.compile(*map(Tensor, (ids, ids, np.ones_like(ids), ids % 8)))
