"""Attention bias from slots and padding."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm_ms.ops.attention import HIDDEN_SCORE


class AttentionBias(nn.Cell):
    """0 where a query may look at a key, HIDDEN_SCORE elsewhere.

    A key is hidden if it comes after the query or is padding. Queries that are padding see every key, future and
    padding too: the reference does this to keep their rows free of NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.later, self.is_padding, self.is_real = ops.Greater(), ops.Equal(), ops.NotEqual()
        self.either, self.both = ops.LogicalOr(), ops.LogicalAnd()
        self.cast, self.multiply = ops.Cast(), ops.Mul()
        self.expand_slots, self.expand_mask, self.expand_heads = (ops.ExpandDims() for _ in range(3))

    def construct(self, query_slots: Tensor, key_slots: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
        """Builds the bias of a whole batch.

        Args:
            query_slots: int32 [S], place of each query in the sequence (padding counts).
            key_slots: int32 [T], place of each key.
            query_mask: int32 [B, S], 0 where the query is padding.
            key_mask: int32 [B, T], 0 where the key is padding or not yet written.

        Returns:
            float32 [B, 1, S, T].
        """
        later = self.later(self.expand_slots(key_slots, 0), self.expand_slots(query_slots, 1))
        padding = self.expand_heads(self.expand_mask(self.is_padding(key_mask, 0), 1), 1)
        real_query = self.expand_heads(self.expand_mask(self.is_real(query_mask, 0), 1), 3)
        hidden = self.both(self.either(later, padding), real_query)
        return self.multiply(self.cast(hidden, ms.float32), HIDDEN_SCORE)
