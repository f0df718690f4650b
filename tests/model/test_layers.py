"""Other linear layers are added through the table of linear layers alone."""

from __future__ import annotations

import numpy as np
import pytest

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.convert.names import expected_shapes
from glm_ms.model.glm import Cells, GLMNetwork
from glm_ms.model.layers import LINEARS, Linear, build_linear
from glm_ms.peft.lora import LoraConfig

CONFIG = GLMConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=24, kv_channels=4, num_attention_heads=4, padded_vocab_size=32,
    multi_query_group_num=2, seq_length=16
)  # fmt: skip
IDS = np.arange(12).reshape(2, 6)


class Doubled(Linear):
    """Twice the product, without bias."""

    def construct(self, x, seeds=None):
        """x [B, ..., in] -> [B, ..., out]."""
        return super().construct(x, seeds) * 2


def weights(scale: float) -> dict[str, np.ndarray]:
    """Random weights; those of linear layers are scaled."""
    generator, found = np.random.default_rng(0), {}
    for name, shape in expected_shapes(CONFIG).items():
        value = generator.normal(0.1, 0.2, shape).astype(np.float32)
        other = "layernorm" in name or "embedding" in name
        found[name] = value if other else value * np.float32(scale)
    return found


def test_a_linear_layer_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of the toy layers gives what a plain network with doubled weights gives: logits, tokens, parameters."""
    monkeypatch.setitem(LINEARS, "doubled", Doubled)
    plain = GLMForCausalLM.from_parameters(CONFIG, weights(2).items())
    toy = GLMForCausalLM(CONFIG, GLMNetwork(CONFIG, Cells(linear="doubled")))
    toy.load_parameters(weights(1).items())
    assert {type(linear) for linear in toy.network.linears().values()} == {Doubled}
    assert len(toy.network.linears()) == 4 * CONFIG.num_layers + 1
    np.testing.assert_array_equal(toy(IDS).asnumpy(), plain(IDS).asnumpy())
    options = {"max_new_tokens": 5, "eos_token_id": []}
    assert toy.generate(IDS, **options) == plain.generate(IDS, **options)


def test_lora_attaches_to_any_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LINEARS, "doubled", Doubled)
    toy = GLMForCausalLM(CONFIG, GLMNetwork(CONFIG, Cells(linear="doubled")))
    before = toy(IDS).asnumpy()
    adapter = toy.add_adapter(LoraConfig(2, 4.0, 0.0, ".*"), seed=1)
    names = [parameter.name for parameter in adapter.parameters()]
    assert names[0] == "transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
    assert len(names) == 2 * len(toy.network.linears())
    np.testing.assert_array_equal(toy(IDS).asnumpy(), before)
    adapter.parameters()[1].set_data(adapter.parameters()[1] + 0.1)
    assert np.abs(toy(IDS).asnumpy() - before).max() > 1e-4


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'int3': unknown; use one of plain"):
        build_linear("int3", CONFIG, 4, 4, has_bias=False)
