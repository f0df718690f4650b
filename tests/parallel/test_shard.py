"""Attaching strategies keeps what is trained and what is frozen."""

from __future__ import annotations

import pytest

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import sharded_glm
from glm_ms.parallel.strategies import attach_strategies
from glm_ms.peft.adapter import AdapterConfig
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig

CONFIG = GLMConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, kv_channels=4, num_attention_heads=4, padded_vocab_size=32,
    multi_query_group_num=2, seq_length=8
)  # fmt: skip
SPLIT = ParallelConfig(data_parallel=2, model_parallel=2)


@pytest.mark.parametrize("adapter", [LoraConfig(2, target_modules=".*"), PrefixConfig(4)], ids=["lora", "ptuning2"])
def test_the_base_under_an_adapter_stays_frozen(adapter: AdapterConfig) -> None:
    model = GLMForCausalLM(CONFIG, sharded_glm(CONFIG, SPLIT))
    names = {parameter.name for parameter in model.add_adapter(adapter).parameters()}
    attach_strategies(model.network, SPLIT)
    assert {parameter.name for parameter in model.network.trainable_params()} == names
    assert len(list(model.network.get_parameters())) > len(names)


def test_without_adapter_everything_is_trained() -> None:
    whole = sum(parameter.size for parameter in GLMForCausalLM(CONFIG).network.trainable_params())
    network = sharded_glm(CONFIG, SPLIT)
    attach_strategies(network, SPLIT)
    assert sum(parameter.size for parameter in network.trainable_params()) == whole
