"""Quantized networks against plain ones with the dequantised weights: logits, gradients, tokens; refusals."""

from __future__ import annotations

import itertools
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import Tensor
from reference import CASES, fresh_golden_model, golden_model, golden_numbers, golden_weights, graph_mode
from tolerances import GRADIENT, LOGITS, LOSS

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.convert.names import expected_shapes
from glm_ms.model.layers import LINEARS, build_linear
from glm_ms.model.loss import GLMWithLoss
from glm_ms.ops.packing import Packed, dequantise
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import sharded_glm
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig
from glm_ms.quant import Quantization, QuantizationError, quantization
from glm_ms.quant.linear import QuantizedLinear
from glm_ms.quant.network import cells_for, quantized_parameters

KINDS = [Quantization(8), *(Quantization(4, group) for group in (32, 64, 128))]
LORA, PREFIX = LoraConfig(4, 8.0, 0.0, ".*"), PrefixConfig(5, dropout=0.0)
NAMES = ("input_ids", "attention_mask", "position_ids")


def dequantised(model: GLMForCausalLM) -> GLMForCausalLM:
    """A plain model with the values that the integers of a quantized one stand for, read from its parameters."""
    weights = {}
    linears = model.network.linears()
    for name, parameter in model.parameters().items():
        if ".quantized." not in name:
            weights[name] = parameter.asnumpy()
    for name, linear in linears.items():
        if isinstance(linear, QuantizedLinear):
            product = linear.quantized
            shape = (product.out_features, product.in_features)
            packed = Packed(product.weight.asnumpy(), product.scale.asnumpy(), shape, product.group)
            weights[f"{name}.weight"] = dequantise(packed)
    return GLMForCausalLM.from_parameters(model.config, weights.items())


@cache
def quantized(case: str, kind: Quantization) -> GLMForCausalLM:
    return fresh_golden_model(case).quantize(kind.bits, kind.group or None)


def logits_of(model: GLMForCausalLM, case: str) -> np.ndarray:
    return model(*(golden_numbers(case)[name] for name in NAMES)).asnumpy()


@pytest.mark.parametrize("kind", slow_unless(KINDS[:2], KINDS), ids=str)
@pytest.mark.parametrize("case", slow_unless(["glm3_tiny"], CASES))
def test_logits_are_those_of_the_dequantised_weights(case: str, kind: Quantization) -> None:
    model = quantized(case, kind)
    np.testing.assert_allclose(logits_of(model, case), logits_of(dequantised(model), case), **LOGITS)


def test_8_bits_change_logits_less_than_4_bits_in_small_groups_than_in_large_ones() -> None:
    plain = logits_of(golden_model("glm3_tiny"), "glm3_tiny")
    errors = [np.abs(logits_of(quantized("glm3_tiny", kind), "glm3_tiny") - plain).mean() for kind in KINDS]
    assert 0 < errors[0] < 0.1 * errors[1] < errors[1] < errors[-1]


def test_every_linear_layer_is_replaced_and_keeps_its_name() -> None:
    model = quantized("glm3_tiny", Quantization(4, 32))
    linears = model.network.linears()
    assert {type(linear) for linear in linears.values()} == {QuantizedLinear}
    names = set(model.parameters())
    for name, linear in linears.items():
        assert {f"{name}.quantized.weight", f"{name}.quantized.scale"} <= names
        assert (f"{name}.bias" in names) == (linear.bias is not None)
        assert linear.quantized.weight.dtype == ms.uint8
    assert not [name for name in names if name.endswith((".dense.weight", "query_key_value.weight"))]


@pytest.mark.parametrize("kind", slow_unless(KINDS[1:2], KINDS), ids=str)
def test_built_and_replaced_networks_are_equal(kind: Quantization) -> None:
    """Weights that are quantized while they are loaded, and those of a model in memory."""
    config, weights = golden_model("glm3_tiny").config, golden_weights("glm3_tiny")
    parameters = quantized_parameters(weights.items(), expected_shapes(config), kind)
    built = GLMForCausalLM.from_parameters(config, parameters, cells_for(kind))
    replaced = quantized("glm3_tiny", kind)
    assert set(built.parameters()) == set(replaced.parameters())
    for name, parameter in built.parameters().items():
        np.testing.assert_array_equal(parameter.asnumpy(), replaced.parameters()[name].asnumpy(), err_msg=name)
    np.testing.assert_array_equal(logits_of(built, "glm3_tiny"), logits_of(replaced, "glm3_tiny"))


def test_the_output_layer_and_the_type_of_the_embedding_can_stay() -> None:
    kind = Quantization(4, 32, output_layer=False, embedding="float16")
    config, weights = golden_model("glm3_tiny").config, golden_weights("glm3_tiny")
    parameters = quantized_parameters(weights.items(), expected_shapes(config), kind)
    model = GLMForCausalLM.from_parameters(config, parameters, cells_for(kind))
    parameters = model.parameters()
    assert parameters["transformer.output_layer.weight"].dtype == ms.float32
    assert parameters["transformer.embedding.embedding_table"].dtype == ms.float16
    np.testing.assert_allclose(logits_of(model, "glm3_tiny"), logits_of(dequantised(model), "glm3_tiny"), **LOGITS)


def gradients(model: GLMForCausalLM, case: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and gradients of what is trained."""
    numbers, with_loss = golden_numbers(case), GLMWithLoss(model.network)
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    arrays = [*(numbers[name] for name in names), np.arange(numbers["input_ids"].shape[1])]
    parameters = with_loss.trainable_params()

    def mean_loss(*inputs: Tensor) -> Tensor:
        total, count = with_loss(*inputs)
        return total / count

    with graph_mode():
        mean = ms.value_and_grad(mean_loss, None, ms.ParameterTuple(parameters))
        loss, found = ms.jit(mean)(*(Tensor(np.asarray(array, np.int32)) for array in arrays))
    return float(loss.asnumpy()), {p.name: g.asnumpy() for p, g in zip(parameters, found)}


@pytest.mark.parametrize("case", slow_unless([(KINDS[1], LORA)], itertools.product(KINDS, (LORA, PREFIX))))
def test_gradients_of_adapters_are_those_over_the_dequantised_weights(
    case: tuple[Quantization, LoraConfig | PrefixConfig],
) -> None:
    kind, adapter = case
    model = fresh_golden_model("glm3_tiny").quantize(kind.bits, kind.group or None)
    plain = dequantised(model)
    for one in (model, plain):
        trained = one.add_adapter(adapter, seed=3).parameters()
        for place, parameter in enumerate(trained):  # B of LoRA is zero at the start, and then A has no gradient
            noise = np.random.default_rng(place).normal(0, 0.02, parameter.shape)
            parameter.set_data(Tensor((parameter.asnumpy() + noise).astype(np.float32)))
    loss, found = gradients(model, "glm3_tiny")
    expected_loss, expected = gradients(plain, "glm3_tiny")
    np.testing.assert_allclose(loss, expected_loss, **LOSS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        assert largest > 0
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=GRADIENT * largest, err_msg=name)


def test_packed_weights_are_never_trained() -> None:
    model = quantized("glm3_tiny", Quantization(8))
    trained = {parameter.name for parameter in model.network.trainable_params()}
    assert not [name for name in trained if ".quantized." in name]


def test_tokens_are_those_of_the_dequantised_weights() -> None:
    model = quantized("glm3_tiny", Quantization(4, 32))
    prompts = [[5, 6, 7], [40, 41, 42, 43, 44]]
    options = {"max_new_tokens": 6, "eos_token_id": []}
    assert model.generate(prompts, **options) == dequantised(model).generate(prompts, **options)


def test_what_cannot_be_quantized_is_refused() -> None:
    model = fresh_golden_model("glm3_tiny")
    before = logits_of(model, "glm3_tiny")
    with pytest.raises(QuantizationError, match="5 bits"):
        model.quantize(5)
    model.add_adapter(LoraConfig(2, 4.0, 0.0))
    with pytest.raises(QuantizationError, match="has an adapter"):
        model.quantize(8)
    np.testing.assert_array_equal(logits_of(model, "glm3_tiny"), before)
    prefixed = fresh_golden_model("glm3_tiny")
    prefixed.add_adapter(PrefixConfig(2))
    with pytest.raises(QuantizationError, match="has an adapter"):
        prefixed.quantize(8)
    with pytest.raises(QuantizationError, match="quantized already"):
        quantized("glm3_tiny", Quantization(8)).quantize(4)
    small = GLMConfig(num_layers=1, hidden_size=8, ffn_hidden_size=16, kv_channels=4, num_attention_heads=2,
                      padded_vocab_size=16, multi_query_group_num=1)  # fmt: skip
    sharded = GLMForCausalLM(small, sharded_glm(small, ParallelConfig()))
    with pytest.raises(QuantizationError, match="query_key_value: layers of a sharded network"):
        sharded.quantize(8)


def test_weights_too_large_for_float16_scales_are_refused_by_name() -> None:
    model = fresh_golden_model("glm3_tiny")
    model.network.transformer.output_layer.weight[0, 0] = 1e6
    with pytest.raises(QuantizationError, match=r"output_layer\.weight: .* use 8 bits"):
        model.quantize(4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_layer_of_odd_sizes(kind: Quantization) -> None:
    """Outputs and inputs that fill no panel and no group; any batch shape."""
    config, generator = golden_model("glm3_tiny").config, np.random.default_rng(0)
    linear = build_linear(kind.kind, config, 45, 35, has_bias=True)
    weight, x = generator.normal(size=(35, 45)).astype(np.float32), generator.normal(size=(2, 3, 45))
    (_, data), (_, scale) = quantized_parameters([("a.weight", weight)], {"a.weight": weight.shape}, kind)
    linear.quantized.weight.set_data(Tensor(data))
    linear.quantized.scale.set_data(Tensor(scale))
    linear.bias.set_data(Tensor(np.arange(35, dtype=np.float32)))
    packed = Packed(data, scale, weight.shape, kind.group)
    expected = x @ dequantise(packed).T.astype(np.float64) + np.arange(35)
    found = linear(Tensor(x.astype(np.float32)))
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_kinds_are_in_the_table_of_linear_layers() -> None:
    assert {kind.kind for kind in KINDS} <= LINEARS.keys()
    assert quantization(4, 64).kind in LINEARS
