"""Next-token cross entropy."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import GatherDGradV2

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

    def per_token(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [B, S, V], labels int32 [B, S] -> loss float32 [B, S] and weight float32 [B, S].

        Entry t belongs to token t + 1; loss and weight are 0 where that token is not a label.
        """
        batch, length = ops.shape(labels)
        last = ops.fill(ms.int32, (batch, 1), IGNORED_LABEL)
        target = self.concat((labels[:, 1:], last))
        weight = self.cast(self.not_equal(target, IGNORED_LABEL), ms.float32)
        index = self.reshape(target * self.cast(weight, ms.int32), (batch * length, 1))
        log_probability = self.log_softmax(self.reshape(logits, (batch * length, -1)))
        loss = -self.reshape(self.pick(log_probability, index), (batch, length))
        return self.multiply(loss, weight), weight

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [B, S, V], labels int32 [B, S] (-100 ignored) -> (sum, count), float32 scalars."""
        loss, weight = self.per_token(logits, labels)
        return self.sum(loss), self.sum(weight)


class GLMWithLoss(nn.Cell):
    """A `GLMNetwork` and its loss as one cell."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = NextTokenLoss()

    def construct(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor,
        seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """All int32 [B, S], slots int32 [S], seeds of dropout int32 [B] or None for no dropout -> (loss sum, number
        of labelled tokens), float32 scalars."""
        return self.loss(self.network(input_ids, attention_mask, position_ids, slots, seeds), labels)
