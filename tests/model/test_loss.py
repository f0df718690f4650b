"""The loss from the logits before labels alone equals that from all logits."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from reference import graph_mode

from glm_ms import GLMConfig, GLMForCausalLM
from glm_ms.model.glm import GLMNetwork
from glm_ms.model.loss import (
    IGNORED_LABEL,
    LabelledLoss,
    NextTokenLoss,
    OutputLayerLoss,
    WholeLoss,
    loss_of,
    training_loss,
)
from glm_ms.ops import registry
from glm_ms.peft.lora import LoraConfig

CONFIG = GLMConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=24, kv_channels=4, num_attention_heads=4, padded_vocab_size=40,
    multi_query_group_num=2, seq_length=16
)  # fmt: skip
GENERATOR = np.random.default_rng(3)
HIDDEN = GENERATOR.normal(size=(3, 7, 16)).astype(np.float32)
LABELS = GENERATOR.integers(0, 40, (3, 7)).astype(np.int32)
LABELS[0, :4], LABELS[1], LABELS[2, 5:] = IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL
# The same products in another number of rows: rounding alone.
SAME = {"rtol": 1e-5, "atol": 1e-6}


def network(targets: str | None = None, dropout: float = 0.0) -> GLMNetwork:
    model = GLMForCausalLM(CONFIG)
    if targets is not None:
        model.add_adapter(LoraConfig(2, 4.0, dropout, targets))
    return model.network


class Differentiated(nn.Cell):
    """Values of a loss, and gradients of the sum: of the first input and of parameters."""

    def __init__(self, loss: nn.Cell, parameters: ms.ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(loss, 0, parameters, has_aux=True)

    def construct(self, hidden: Tensor, labels: Tensor) -> tuple:
        """hidden [B, S, H], labels [B, S]."""
        return self.value_and_grad(hidden, labels)


def results(loss: nn.Cell, labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Loss sum, number of labels, gradients of the hidden states and of the output layer, over `count` calls."""
    weight = loss.network.transformer.output_layer.weight
    weight.requires_grad = True
    function = Differentiated(loss, ms.ParameterTuple([weight]))
    with graph_mode():
        for _ in range(count):
            values, (of_hidden, (of_weight,)) = function(Tensor(HIDDEN), Tensor(labels))
    return [value.asnumpy() for value in (*values, of_hidden, of_weight)]


@pytest.mark.parametrize("targets", [None, ".*output_layer"])
def test_loss_and_gradients(targets: str | None) -> None:
    net = network(targets)
    wanted = results(WholeLoss(net, NextTokenLoss()), LABELS, 1)
    found = results(LabelledLoss(net), LABELS, 2)
    assert wanted[1] == np.count_nonzero(LABELS[:, 1:] != IGNORED_LABEL)
    assert np.abs(wanted[3]).max() > 0.1
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, **SAME)


def kernel_loss(net: GLMNetwork) -> nn.Cell:
    """The loss of a training step; skips the test where there is no kernel for it."""
    if registry.step_kernel("output loss") is None:
        pytest.skip("no C++ kernels, or no oneDNN")
    return training_loss(net)


def test_loss_and_gradients_of_the_kernel() -> None:
    net = network()
    loss = kernel_loss(net)
    assert isinstance(loss, OutputLayerLoss)
    for one, other in zip(results(loss, LABELS, 2), results(WholeLoss(net, NextTokenLoss()), LABELS, 1)):
        np.testing.assert_allclose(one, other, **SAME)


def test_the_kernel_without_the_gradient_of_a_frozen_weight() -> None:
    net = network(".*query_key_value")
    assert not net.transformer.output_layer.weight.requires_grad
    loss = kernel_loss(net)

    def part(*inputs: Tensor) -> Tensor:
        return loss(*inputs)[0] * 0.25

    with graph_mode():
        value, of_hidden = ms.jit(ops.value_and_grad(part, 0))(Tensor(HIDDEN), Tensor(LABELS))
    wanted = results(WholeLoss(net, NextTokenLoss()), LABELS, 1)
    np.testing.assert_allclose(value.asnumpy(), 0.25 * wanted[0], **SAME)
    np.testing.assert_allclose(of_hidden.asnumpy(), 0.25 * wanted[2], **SAME)


def test_the_kernel_is_for_plain_output_layers() -> None:
    kernel_loss(network())
    assert isinstance(training_loss(network(".*output_layer")), LabelledLoss)
    assert isinstance(training_loss(network(".*output_layer", 0.1)), WholeLoss)


@pytest.mark.parametrize("kind", ["portable", "kernel"])
def test_a_batch_without_labels_has_no_loss(kind: str) -> None:
    loss = LabelledLoss(network()) if kind == "portable" else kernel_loss(network())
    for value in results(loss, np.full_like(LABELS, IGNORED_LABEL), 1):
        assert not value.any()


def test_all_logits_where_dropout_needs_the_places_of_a_row() -> None:
    assert isinstance(loss_of(network()), LabelledLoss)
    assert isinstance(loss_of(network(".*output_layer")), LabelledLoss)
    assert isinstance(loss_of(network(".*output_layer", 0.1)), WholeLoss)
