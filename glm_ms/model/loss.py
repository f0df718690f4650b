"""Next-token cross entropy."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import GatherDGradV2

from glm_ms.model.glm import GLMNetwork
from glm_ms.model.layers import Linear
from glm_ms.ops.registry import step_kernel

IGNORED_LABEL = -100
# The gradient operator of GatherD clears its result with memset_s, which takes less than 2^31 bytes.
_CLEARABLE = 2**29 - 1


class PickTargets(nn.Cell):
    """One element of each row. Its gradient may have any size, that of GatherD on a CPU only `_CLEARABLE` elements."""

    def __init__(self) -> None:
        super().__init__()
        self.gather, self.gather_gradient = ops.GatherD(), GatherDGradV2()
        self.hit, self.select, self.zeros = ops.Equal(), ops.Select(), ops.ZerosLike()

    def construct(self, x: Tensor, index: Tensor) -> Tensor:
        """x float32 [N, V], index int32 [N, 1] -> float32 [N, 1]."""
        return self.gather(x, 1, index)

    def bprop(self, x: Tensor, index: Tensor, _: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the result, float32 [N, 1] -> that of x, float32 [N, V], and zeros."""
        rows, size = ops.shape(x)
        if rows * size <= _CLEARABLE:
            found = self.gather_gradient(x, 1, index, gradient)
        else:
            hits = self.hit(index, Tensor(np.arange(size, dtype=np.int32)))
            gradient = ops.broadcast_to(gradient, (rows, size))
            found = self.select(hits, gradient, self.zeros(gradient))  # a product takes twice the memory
        return found, ops.zeros_like(index)


class NextTokenLoss(nn.Cell):
    """Sum of -log p(token t+1 | tokens <= t) over the labelled tokens, and their number.

    Sum and count are separate, so that batches of unequal token counts can be averaged exactly. The labels are
    shifted rather than the logits: shifting logits would copy [B, S, V].
    """

    def __init__(self) -> None:
        super().__init__()
        self.concat, self.not_equal = ops.Concat(axis=1), ops.NotEqual()
        self.log_softmax, self.pick = ops.LogSoftmax(axis=-1), PickTargets()
        self.multiply, self.sum = ops.Mul(), ops.ReduceSum()
        self.cast, self.reshape = ops.Cast(), ops.Reshape()

    def targets(self, labels: Tensor) -> Tensor:
        """labels int32 [B, S] -> the label of token t + 1 at entry t, int32 [B * S]; -100 where it has no loss."""
        last = ops.fill(ms.int32, (ops.shape(labels)[0], 1), IGNORED_LABEL)
        return self.reshape(self.concat((labels[:, 1:], last)), (-1,))

    def cross_entropy(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [N, V], target int32 [N] -> loss and weight, float32 [N]; both 0 where target is -100."""
        weight = self.cast(self.not_equal(target, IGNORED_LABEL), ms.float32)
        index = self.reshape(target * self.cast(weight, ms.int32), (-1, 1))
        loss = -self.reshape(self.pick(self.log_softmax(logits), index), (-1,))
        return self.multiply(loss, weight), weight

    def per_token(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [B, S, V], labels int32 [B, S] -> loss float32 [B, S] and weight float32 [B, S].

        Entry t belongs to token t + 1; loss and weight are 0 where that token is not a label.
        """
        target = self.targets(labels)
        logits = self.reshape(logits, (ops.shape(target)[0], -1))
        loss, weight = self.cross_entropy(logits, target)
        return self.reshape(loss, ops.shape(labels)), self.reshape(weight, ops.shape(labels))

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [B, S, V], labels int32 [B, S] (-100 ignored) -> (sum, count), float32 scalars."""
        loss, weight = self.per_token(logits, labels)
        return self.sum(loss), self.sum(weight)


class WholeLoss(nn.Cell):
    """The loss of a network from the logits of all tokens: every shape follows from that of the batch.

    `loss` is (logits, labels) -> (loss sum, number of labelled tokens).
    """

    def __init__(self, network: GLMNetwork, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.loss = network, loss

    def construct(self, hidden: Tensor, labels: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input of the output layer [B, S, H], labels int32 [B, S], seeds of dropout int32 [B] or None -> (loss sum,
        number of labelled tokens), float32 scalars."""
        return self.loss(self.network.logits(hidden, seeds), labels)


class LabelledLoss(nn.Cell):
    """The loss of a network from the logits before labels alone: other tokens cost no product with the vocabulary.

    The number of logits is known only when the graph runs.
    """

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.loss = network, NextTokenLoss()
        self.find, self.gather, self.join = ops.NonZero(), ops.Gather(), ops.Concat(axis=0)
        self.is_label, self.reshape, self.sum = ops.NotEqual(), ops.Reshape(), ops.ReduceSum()
        self.first = Tensor([True])

    def construct(self, hidden: Tensor, labels: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `WholeLoss`, without dropout in the output layer."""
        return self.of_targets(self.reshape(hidden, (-1, ops.shape(hidden)[2])), self.loss.targets(labels))

    def of_targets(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, H], the token to predict from each int32 [N], -100 for none -> as `construct`."""
        # The first entry is always kept, because there are no products of 0 rows; without a label its weight is 0.
        kept = self.join((self.first, self.is_label(target[1:], IGNORED_LABEL)))
        places = self.reshape(self.find(kept), (-1,))
        hidden = self.gather(hidden, places, 0)
        loss, weight = self.loss.cross_entropy(self.network.logits(hidden), self.gather(target, places, 0))
        return self.sum(loss), self.sum(weight)


def loss_of(network: GLMNetwork) -> nn.Cell:
    """The loss of a network for the current device and the adapter that the network has."""
    update = network.transformer.output_layer.lora
    drops = getattr(update, "dropout", None) is not None  # by the place in the row, which chosen tokens lose
    if drops or ms.get_context("device_target") == "Ascend":  # whose graphs want static shapes
        return WholeLoss(network, NextTokenLoss())
    return LabelledLoss(network)


class OutputLayerLoss(nn.Cell):
    """The loss of a network from a kernel that contains the output layer, a plain one in float32.

    `kernel` is (hidden [N, H], weight [V, H], targets [N]) -> (loss sum [1], ...).
    """

    def __init__(self, network: GLMNetwork, kernel: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.kernel, self.loss = network, kernel, NextTokenLoss()
        self.is_label, self.cast, self.reshape, self.sum = ops.NotEqual(), ops.Cast(), ops.Reshape(), ops.ReduceSum()

    def construct(self, hidden: Tensor, labels: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `WholeLoss`."""
        return self.of_targets(self.reshape(hidden, (-1, ops.shape(hidden)[2])), self.loss.targets(labels))

    def of_targets(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """As that of `LabelledLoss`."""
        total = self.kernel(hidden, self.network.transformer.output_layer.weight, target)[0]
        count = self.sum(self.cast(self.is_label(target, IGNORED_LABEL), ms.float32))
        return self.reshape(total, ()), count


def training_loss(network: GLMNetwork, bfloat16: bool = False) -> nn.Cell:
    """The loss that a training step differentiates: as `loss_of`, by the kernel of this device if it fits.

    Freeze the weights that are not trained, and attach the adapter, before. `bfloat16`: the kernel rounds the operands
    of its products.
    """
    kernel, layer = step_kernel("output loss"), network.transformer.output_layer
    is_plain = type(layer) is Linear and layer.lora is None and layer.bias is None
    if kernel is None or not is_plain or (layer.dtype, layer.weight.dtype) != (ms.float32, ms.float32):
        return loss_of(network)
    return OutputLayerLoss(network, kernel(layer.weight.requires_grad, bfloat16))


class GLMWithLoss(nn.Cell):
    """A `GLMNetwork` and its loss as one cell."""

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.loss = network, loss_of(network)

    def construct(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor,
        seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """All int32 [B, S], slots int32 [S], seeds of dropout int32 [B] or None for no dropout -> (loss sum, number
        of labelled tokens), float32 scalars."""
        hidden = self.network.transformer(input_ids, attention_mask, position_ids, slots, seeds)
        return self.loss(hidden, labels, seeds)
