"""The network against the reference: logits, hidden states, loss, gradients, masks, caches."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from marks import slow_unless
from mindspore import Tensor, nn, ops
from reference import CASES, FOLDER, golden_model, golden_numbers, graph_mode
from safetensors.numpy import load_file
from tolerances import GRAD_NORM, LOGITS, LOSS

from glm_ms.convert.names import to_glm_name
from glm_ms.generation.graphs import run_cell
from glm_ms.generation.inputs import Prompt
from glm_ms.generation.paged import PagedDecoder
from glm_ms.generation.paged_graphs import PagedGraphs
from glm_ms.generation.pages import PAGE, RESERVED
from glm_ms.model import loss as loss_module
from glm_ms.model.loss import GLMWithLoss, NextTokenLoss


def int_tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [Tensor(np.ascontiguousarray(array, np.int32)) for array in arrays]


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str) -> None:
    numbers = golden_numbers(case)
    logits = golden_model(case)(numbers["input_ids"], numbers["attention_mask"], numbers["position_ids"])
    assert logits.dtype == ms.float32
    # Padded positions too: the rule for their rows is the reference's own.
    np.testing.assert_allclose(logits.asnumpy(), numbers["logits"], **LOGITS)


@pytest.mark.parametrize("case", CASES)
def test_row_without_padding_alone(case: str) -> None:
    numbers = golden_numbers(case)
    row = golden_model(case)(numbers["input_ids"][:1].tolist()).asnumpy()
    np.testing.assert_allclose(row, numbers["logits"][:1], **LOGITS)
    start = int(np.argmax(numbers["attention_mask"][1]))
    unpadded = golden_model(case)(numbers["input_ids"][1, start:]).asnumpy()
    np.testing.assert_allclose(unpadded[0], numbers["logits"][1, start:], **LOGITS)


def test_far_positions() -> None:
    numbers = golden_numbers("glm3_32k_tiny")
    positions = numbers["position_ids"][:1] + int(numbers["pos_offset"])
    logits = golden_model("glm3_32k_tiny")(numbers["input_ids"][:1], position_ids=positions).asnumpy()
    expected = numbers["logits_row0_pos_offset"].reshape(logits.shape)
    np.testing.assert_allclose(logits, expected, **LOGITS)


class _States(nn.Cell):
    """Every hidden state and the mask bias, by the layers of a network."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = network.transformer

    def construct(self, input_ids: Tensor, mask: Tensor, positions: Tensor, slots: Tensor) -> tuple:
        net = self.transformer
        cos, sin = net.rotation(positions)
        bias = net.attention_bias(slots, slots, mask, mask)
        states = (net.embedding(input_ids),)
        for layer in net.encoder.layers:
            states += (layer(states[-1], cos, sin, bias),)
        return (*states, net.encoder.finish(states[-1]), bias)


# The logits of every case are compared above.
DAILY = ("glm2_tiny", "glm3_tiny")


@pytest.mark.parametrize("case", slow_unless(DAILY, CASES))
def test_hidden_states_and_mask(case: str) -> None:
    numbers = golden_numbers(case)
    inputs = (numbers["input_ids"], numbers["attention_mask"], numbers["position_ids"], np.arange(24))
    *states, final, bias = run_cell(_States(golden_model(case).network), *inputs)
    hidden = np.stack([state.asnumpy() for state in states])
    np.testing.assert_allclose(hidden, numbers["hidden_states"], **LOGITS)
    np.testing.assert_allclose(final.asnumpy(), numbers["final_hidden"], **LOGITS)
    np.testing.assert_array_equal(bias.asnumpy() < 0, numbers["full_attention_mask"])


@pytest.mark.parametrize("case", slow_unless(DAILY, CASES))
def test_loss(case: str) -> None:
    numbers = golden_numbers(case)
    model = golden_model(case)
    loss = model(numbers["input_ids"], numbers["attention_mask"], numbers["position_ids"], labels=numbers["labels"])
    np.testing.assert_allclose(loss.asnumpy(), numbers["loss"], **LOSS)
    with graph_mode():
        per_token, weight = NextTokenLoss().per_token(Tensor(numbers["logits"]), *int_tensors(numbers["labels"]))
    assert int(weight.asnumpy().sum()) == int(numbers["num_loss_tokens"])
    np.testing.assert_allclose(per_token.asnumpy()[:, :-1], numbers["per_token_loss"], **LOSS)


def test_gradients_of_the_loss_are_the_same_for_logits_beyond_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """GatherD's gradient ends at 2^29 elements; here the limit is lowered."""
    numbers = golden_numbers(DAILY[0])
    logits, (labels,) = Tensor(numbers["logits"]), int_tensors(numbers["labels"])
    found = []
    with graph_mode():
        for limit in (loss_module._CLEARABLE, logits.size - 1):
            monkeypatch.setattr(loss_module, "_CLEARABLE", limit)
            gradient, _ = ms.grad(NextTokenLoss(), has_aux=True)(logits, labels)
            found.append(gradient.asnumpy())
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0]).max() > 0


@pytest.mark.parametrize("case", slow_unless(DAILY, CASES))
def test_gradients(case: str) -> None:
    numbers = golden_numbers(case)
    reference = json.loads((FOLDER / case / "grad_norms.json").read_text())
    with_loss = GLMWithLoss(golden_model(case).network)
    parameters = with_loss.trainable_params()
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    inputs = int_tensors(*(numbers[name] for name in names), np.arange(24))

    def mean_loss(*inputs: Tensor) -> Tensor:
        total, count = with_loss(*inputs)
        return total / count

    mean = ops.value_and_grad(mean_loss, None, ms.ParameterTuple(parameters))
    with graph_mode():
        loss, gradients = ms.jit(mean)(*inputs)
    np.testing.assert_allclose(loss.asnumpy(), reference["loss"], **LOSS)
    found = {p.name: g.asnumpy() for p, g in zip(parameters, gradients)}
    total = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in found.values()))
    np.testing.assert_allclose(total, reference["global_norm"], **GRAD_NORM)
    for name, norm in reference["grad_l2_norm"].items():
        gradient = found.pop(to_glm_name(name))
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, err_msg=name, **GRAD_NORM)
        # A sum cancels; its rounding is that of the terms, whose size the norm gives.
        room = GRAD_NORM["atol"] + GRAD_NORM["rtol"] * max(abs(reference["grad_sum"][name]), norm)
        assert abs(gradient.sum(dtype=np.float64) - reference["grad_sum"][name]) <= room, name
    assert not found
    if case == "glm2_tiny":
        expected = load_file(FOLDER / case / "grads.safetensors")
        for p, g in zip(parameters, gradients):
            name = next(k for k in expected if to_glm_name(k) == p.name)
            np.testing.assert_allclose(g.asnumpy(), expected[name], err_msg=name, rtol=1e-4, atol=1e-5)


def first_columns(numbers: dict[str, np.ndarray], count: int) -> list[Prompt]:
    """The golden rows up to a column, without their padding."""
    rows = zip(*(numbers[k][:, :count] for k in ("input_ids", "position_ids", "attention_mask")))
    return [Prompt(ids[mask == 1], positions[mask == 1]) for ids, positions, mask in rows]


@pytest.mark.parametrize("case", slow_unless(DAILY, CASES))
def test_prefill_steps_and_cache(case: str) -> None:
    numbers = golden_numbers(case)
    model = golden_model(case)
    decoder = PagedDecoder(PagedGraphs(model.network, 2, 32))
    slots, logits = decoder.add(first_columns(numbers, 16))
    np.testing.assert_allclose(logits, numbers["prefill_logits_last"], **LOGITS)
    for i in range(16, 24):
        logits = decoder.step(slots, numbers["input_ids"][:, i])
        np.testing.assert_allclose(logits, numbers["incremental_logits"][i - 16], **LOGITS)
    real = numbers["attention_mask"].astype(bool)
    kept = [layer for layer in range(model.config.num_layers) if f"past_key_layer{layer}" in numbers]
    assert 0 in kept
    for layer in kept:
        for name, tables in (("key", decoder.graphs.cache.keys), ("value", decoder.graphs.cache.values)):
            table = tables[layer].asnumpy().reshape(-1, model.config.num_kv_heads, PAGE, model.config.kv_channels)
            for row in range(2):
                pages = [RESERVED + row, RESERVED + 2 + row]  # the prompts take one page each, then the steps
                expected = numbers[f"past_{name}_layer{layer}"][row, real[row]]
                found = np.concatenate(table[pages].transpose(0, 2, 1, 3))
                np.testing.assert_allclose(found[: len(expected)], expected, **LOGITS)
