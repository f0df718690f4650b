from __future__ import annotations

import pytest

from glm_ms import GLMForCausalLM
from glm_ms.engine.step.network import ShardedTrainingNetwork
from glm_ms.engine.weights import adapter_config
from glm_ms.parallel.layers import sharded_glm
from glm_ms.peft.adapter import AdapterError
from glm_ms.plan import planned_parameters
from glm_ms.plan.planned_parameters import lora_targets
from glm_ms.settings import load_settings
from glm_ms.settings.schema import parallel_of
from tests.plan.test_measured_memory import BASE, CONFIG, LORA, SHARDED, keys

TINY = keys(1, 16, 2, 32, 48, 64)
PREFIX = (BASE, "model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=3")
CASES = {
    "full": (),
    "half frozen": (*LORA, "model.model_config.param_init_type=float16"),
    "lora on everything": (*LORA, "model.pet_config.target_modules=.*"),
    "lora by endings": (*LORA, "model.pet_config.target_modules=[dense, output_layer]"),
    "prefix": PREFIX,
    "prefix with an MLP": (
        *PREFIX,
        "model.pet_config.prefix_projection=True",
        "model.pet_config.projection_dim=5",
    ),
    "layer norm, biases": ("model.model_config.rmsnorm=False", "model.model_config.add_bias_linear=True"),
    "every head its own key": ("model.model_config.multi_query_attention=False",),
    "sharded": SHARDED,
    "sharded lora": (*SHARDED, *LORA, "model.pet_config.target_modules=.*"),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_those_of_the_network(name: str) -> None:
    settings = load_settings(CONFIG, [*TINY, *CASES[name]], check_files=False)
    config, parallel = settings.glm_config(), parallel_of(settings)
    sharded = name.startswith("sharded")
    model = GLMForCausalLM(config, sharded_glm(config, parallel) if sharded else None)
    adapter = adapter_config(settings)
    if adapter is not None:
        model.add_adapter(adapter)
    if sharded:
        ShardedTrainingNetwork(model.network, parallel, 16)
    planned = planned_parameters(settings, settings.glm_config())
    found = {p.name: (tuple(p.shape), p.itemsize, p.requires_grad) for p in model.network.get_parameters()}
    assert {n: (p.shape, p.item_bytes, p.trained) for n, p in planned.items()} == found


def test_nothing_is_trained_in_an_evaluation() -> None:
    settings = load_settings(
        CONFIG, keys(1, 256, 2, 32, 48, 64), {"run_mode": "eval", "load_checkpoint": "x"}, check_files=False
    )
    assert not any(p.trained for p in planned_parameters(settings, settings.glm_config()).values())


def test_pattern_without_a_module() -> None:
    settings = load_settings(CONFIG, [*TINY, *LORA, "model.pet_config.target_modules=qkv"], check_files=False)
    with pytest.raises(AdapterError, match="qkv"):
        lora_targets(settings, settings.glm_config())
