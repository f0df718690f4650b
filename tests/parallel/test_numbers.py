"""A sharded network computes what the network it was made of computes: loss and gradients, on one card.

How the cards share the work is the compiler's part, which the strategies of test_strategies.py show; here it is shown
that the cells which take the place of the network's own have its mathematics.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.convert.names import split_joint
from glm_ms.engine.step.network import ShardedTrainingNetwork, TrainingNetwork
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import ShardedAttention, sharded_glm
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig
from tests.parallel.one_card import use_portable_rotary
from tests.tolerances import GRADIENT, LOSS

LENGTH = 12
SIZES = {
    "num_layers": 2, "padded_vocab_size": 64, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
    "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 16,
}  # fmt: skip
CASES = {
    "whole": ({}, ParallelConfig(), None),
    "four cards, two groups": ({}, ParallelConfig(model_parallel=4, vocab_emb_dp=False), None),
    "sequence parallel": ({}, ParallelConfig(model_parallel=2, use_seq_parallel=True), None),
    "layer norm, biases": (
        {"rmsnorm": False, "add_bias_linear": True},
        ParallelConfig(model_parallel=2),
        None,
    ),
    "dropout": ({"hidden_dropout": 0.2, "attention_dropout": 0.2}, ParallelConfig(model_parallel=2), None),
    "lora": ({}, ParallelConfig(model_parallel=2), LoraConfig(4, 8.0, 0.2, ".*")),
    "prefix": ({}, ParallelConfig(model_parallel=4), PrefixConfig(3, False, None, 0.2)),
}


def batch(seeds: bool) -> list[Tensor]:
    """Two rows, one of them padded on the left and partly labelled."""
    generator = np.random.default_rng(1)
    ids = generator.integers(3, 64, (2, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    labels = np.where(mask == 1, ids, -100).astype(np.int32)
    labels[0, :5] = -100
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    inputs = [ids, labels, mask, positions]
    if seeds:
        inputs.append(np.array([5, 9], np.int32))
    return [Tensor(value) for value in inputs]


def build(config: GLMConfig, adapter: object | None) -> GLMForCausalLM:
    """A network whose every parameter, those that begin at zero or one too, is drawn by its name's place."""
    model = GLMForCausalLM(config)
    if adapter is not None:
        model.add_adapter(adapter)
    generator = np.random.default_rng(2)
    for parameter in model.network.get_parameters():
        values = generator.normal(0.1, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(values))
    return model


def apart(values: dict[str, np.ndarray], config: GLMConfig) -> dict[str, np.ndarray]:
    """The same with joint layers in parts."""
    return {part: piece for name, value in values.items() for part, piece in split_joint(name, value, config)}


def loss_and_gradients(network: ms.nn.Cell, inputs: list[Tensor]) -> tuple[float, float, dict[str, np.ndarray]]:
    weights: list[Parameter] = network.trainable_params()
    network.set_train()
    step = ms.value_and_grad(network, None, ms.ParameterTuple(weights), has_aux=True)
    (loss, tokens), gradients = step(*inputs)
    named = {weight.name: value.asnumpy() for weight, value in zip(weights, gradients)}
    return float(loss.asnumpy()), float(tokens.asnumpy()), named


@pytest.mark.parametrize("name", CASES)
def test_equals_the_network_it_was_made_of(name: str) -> None:
    more, parallel, adapter = CASES[name]
    config = GLMConfig(**{**SIZES, **more})
    inputs = batch(seeds=bool(adapter) or config.hidden_dropout > 0)
    whole = build(config, adapter)
    values = {parameter.name: parameter.asnumpy().copy() for parameter in whole.network.get_parameters()}
    loss, tokens, gradients = loss_and_gradients(TrainingNetwork(whole.network, LENGTH), inputs)

    model = GLMForCausalLM(config, sharded_glm(config, parallel))
    if adapter is not None:
        model.add_adapter(adapter)
    sharded = ShardedTrainingNetwork(model.network, parallel, LENGTH)
    use_portable_rotary(model.network)
    parts = apart(values, config)
    for parameter in sharded.get_parameters():
        parameter.set_data(Tensor(parts[parameter.name]))
    found_loss, found_tokens, found = loss_and_gradients(sharded, inputs)

    assert found_tokens == tokens == 15
    np.testing.assert_allclose(found_loss / tokens, loss / tokens, **LOSS)
    expected = apart(gradients, config)
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        difference = np.abs(found[key] - value).max()
        assert difference <= GRADIENT * max(np.abs(value).max(), 1e-3), (key, difference)


def test_sharded_attention_refuses_a_cache() -> None:
    with pytest.raises(ValueError, match="no cache"):
        ShardedAttention.construct(None, None, None, None, None, cache=())
