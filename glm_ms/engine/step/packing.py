"""Batches without their padding: each token once, row after row."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from glm_ms.model.glm import GLMNetwork
from glm_ms.model.loss import IGNORED_LABEL, NextTokenLoss, WholeLoss


def packs(network: GLMNetwork, loss: nn.Cell) -> bool:
    """Whether a network, with its kernels and adapter, and its loss take packed rows.

    The attention needs a kernel, prefixes are not packed, and `WholeLoss` is for static shapes.
    """
    layers = network.transformer.encoder.layers
    attention = all(getattr(layer.self_attention.attention, "packs", False) for layer in layers)
    return attention and network.transformer.prefix_encoder is None and not isinstance(loss, WholeLoss)


class PackRows(nn.Cell):
    """Leaves out the places of a batch that its loss does not depend on.

    Those are the padding. A row that asks a padding token to predict a label stays whole: such a token sees all of it.
    The number of tokens is known only when the graph runs. The first place always stays, because there are no products
    of 0 rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets = NextTokenLoss().targets
        self.find, self.gather, self.join, self.stack = ops.NonZero(), ops.Gather(), ops.Concat(), ops.Stack(axis=1)
        self.either, self.both, self.not_equal = ops.LogicalOr(), ops.LogicalAnd(), ops.NotEqual()
        self.any, self.select = ops.ReduceAny(keep_dims=True), ops.Select()
        self.equal, self.cast, self.reshape = ops.Equal(), ops.Cast(), ops.Reshape()
        self.first = Tensor([True])

    def kept(self, targets: Tensor, mask: Tensor) -> Tensor:
        """targets int32 [B * S], mask int32 [B, S] -> bool [B * S]."""
        predicts = self.reshape(self.not_equal(targets, IGNORED_LABEL), ops.shape(mask))
        stays_whole = self.any(self.both(self.equal(mask, 0), predicts), 1)
        kept = self.either(self.not_equal(mask, 0), stays_whole)
        return self.join((self.first, self.reshape(kept, (-1,))[1:]))

    def construct(
        self, input_ids: Tensor, labels: Tensor, mask: Tensor, position_ids: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, ...]:
        """All int32 [B, S], seeds int32 [B] or None -> of the tokens T that are kept: ids and positions int32 [T, 1],
        targets (see `NextTokenLoss`) int32 [T], numbers of their rows int32 [T], -1 - number for padding, and the
        seeds of their rows with the places in them, int32 [T, 2], or None."""
        length, targets = ops.shape(input_ids)[1], self.targets(labels)
        found = self.cast(self.reshape(self.find(self.kept(targets, mask)), (-1,)), ms.int32)
        ids, positions, mask, targets = (
            self.gather(self.reshape(column, (-1,)), found, 0) for column in (input_ids, position_ids, mask, targets)
        )
        rows, places = found // length, found % length
        numbers = self.select(self.equal(mask, 0), -1 - rows, rows)
        if seeds is not None:
            seeds = self.stack((self.gather(seeds, rows, 0), places))
        return self.reshape(ids, (-1, 1)), self.reshape(positions, (-1, 1)), targets, numbers, seeds
