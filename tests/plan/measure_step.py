"""Two training steps of a configuration on a CPU; MindSpore prints the most that its memory pool held.

measure_step.py CONFIG [key=value ...]
"""

from __future__ import annotations

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms import GLMForCausalLM
from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.network import ShardedTrainingNetwork, TrainingNetwork, recompute_blocks
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.weights import adapter_config
from glm_ms.model.loss import NextTokenLoss, WholeLoss
from glm_ms.parallel.layers import sharded_glm
from glm_ms.settings import load_settings
from glm_ms.settings.schema import is_sharded, parallel_of, training_length
from tests.parallel.one_card import use_portable_rotary

ms.set_context(mode=ms.GRAPH_MODE)
settings = load_settings(sys.argv[1], sys.argv[2:], check_files=False)
config, rows, length = settings.glm_config(), settings.runner_config.batch_size, training_length(settings)
model = GLMForCausalLM(config, sharded_glm(config, parallel_of(settings)) if is_sharded(settings) else None)
adapter = adapter_config(settings)
if adapter is not None:
    model.add_adapter(adapter)
if is_sharded(settings):  # on one card its operators do the whole work
    network = ShardedTrainingNetwork(model.network, parallel_of(settings), length)
    use_portable_rotary(model.network)
else:
    # The loss of a card, which computes all scores.
    network = TrainingNetwork(model.network, length, WholeLoss(model.network, NextTokenLoss()))
recompute_blocks(model.network, settings)
step = GLMTrainOneStep(network, GLMAdamW(model.network.trainable_params(), 1e-3), 1.0)
step.set_train()
generator = np.random.default_rng(0)
ids = generator.integers(0, config.padded_vocab_size, (rows, length)).astype(np.int32)
positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
inputs = [ids, ids, np.ones_like(ids), positions]
if config.hidden_dropout or config.attention_dropout or adapter is not None:
    inputs.append(np.arange(rows, dtype=np.int32))
for _ in range(2):
    loss = float(step(*map(Tensor, inputs))[0].asnumpy())
    assert np.isfinite(loss), loss
