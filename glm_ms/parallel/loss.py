"""Next-token cross entropy with the vocabulary split over cards."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm_ms.model.loss import IGNORED_LABEL
from glm_ms.parallel.config import ParallelConfig


class VocabularyParallelLoss(nn.Cell):
    """`NextTokenLoss` of operators that each card computes for its part of the vocabulary.

    log softmax takes a maximum and a sum, which are reduced over the cards; no card has all logits of a row.

    Args:
        vocab_size: V.
        parallel: rows are split by data_parallel, the vocabulary by model_parallel.
    """

    def __init__(self, vocab_size: int, parallel: ParallelConfig) -> None:
        super().__init__()
        d, m = parallel.data_parallel, parallel.model_parallel
        self.vocab_size = vocab_size
        rows, cards = (d, 1), (d, m)
        self.tail = ops.StridedSlice().shard((rows,))
        self.concat = ops.Concat(axis=1).shard((rows, rows))
        self.not_equal = ops.NotEqual().shard((rows, ()))
        self.to_float, self.to_int = ops.Cast().shard((rows,)), ops.Cast().shard((rows,))
        self.mask_target = ops.Mul().shard((rows, rows))
        self.maximum = ops.ReduceMax(keep_dims=True).shard((cards,))
        self.shift = ops.Sub().shard((cards, rows))
        self.exp, self.log = ops.Exp().shard((cards,)), ops.Log().shard((rows,))
        self.sum_exp = ops.ReduceSum(keep_dims=True).shard((cards,))
        self.one_hot = ops.OneHot().shard((cards, (), ()))
        self.pick = ops.Mul().shard((cards, cards))
        self.sum_picked = ops.ReduceSum(keep_dims=True).shard((cards,))
        self.subtract, self.weigh = ops.Sub().shard((rows, rows)), ops.Mul().shard((rows, rows))
        self.total, self.count = ops.ReduceSum().shard((rows,)), ops.ReduceSum().shard((rows,))
        self.reshape = ops.Reshape()
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits float32 [M, V] with M = B * S, labels int32 [B, S] (-100 ignored) -> (sum, count), float32
        scalars."""
        batch, length = ops.shape(labels)
        last = ops.fill(ms.int32, (batch, 1), IGNORED_LABEL)
        target = self.concat((self.tail(labels, (0, 1), (batch, length), (1, 1)), last))
        real = self.not_equal(target, IGNORED_LABEL)
        target = self.reshape(self.mask_target(target, self.to_int(real, ms.int32)), (batch * length,))
        weight = self.reshape(self.to_float(real, ms.float32), (batch * length, 1))
        shifted = self.shift(logits, ops.stop_gradient(self.maximum(logits, 1)))
        log_sum = self.log(self.sum_exp(self.exp(shifted), 1))
        one_hot = self.one_hot(target, self.vocab_size, self.on, self.off)
        loss = self.subtract(log_sum, self.sum_picked(self.pick(shifted, one_hot), 1))
        return self.total(self.weigh(loss, weight)), self.count(weight)
