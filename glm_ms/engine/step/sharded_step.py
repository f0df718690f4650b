"""Training steps for networks whose weights are split over cards by MindSpore's parallel compiler.

The compiler itself sums what the strategies split: loss and token count come out whole on every card, and every
gradient is that of the whole batch, cut like its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import create_group
from mindspore.nn import Optimizer
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

from glm_ms.engine.step.loss_scale import OverflowDetector
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.parallel.config import ParallelConfig


class Stacked(nn.Cell):
    """Loss sum and token count as one tensor.

    A pipeline adds one tensor over its micro batches. And the compiler divides the derivative of a network by the cards
    that all have its output only where it has a single one; of several outputs every gradient would be that many times
    too large.

    Args:
        network: cell that returns (loss sum, number of labelled tokens).
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.reshape = ops.Reshape()
        self.join = ops.Concat().shard(((1,), (1,)))

    def construct(self, *inputs: Tensor) -> Tensor:
        """-> float32 [2]."""
        loss, tokens = self.network(*inputs)
        return self.join((self.reshape(loss, (1,)), self.reshape(tokens, (1,))))


def spread(network: nn.Cell, parallel: ParallelConfig) -> nn.Cell:
    """A network whose inputs are given out to the cards, and to micro batches where there are stages.

    Args:
        network: cell that returns (loss sum, number of labelled tokens) of a micro batch.
        parallel: stages and micro batches.

    Returns:
        Cell that returns loss sum and token count of a whole step as one tensor [2].
    """
    step: nn.Cell = Stacked(network)
    if parallel.pipeline_stages > 1:
        step = nn.PipelineCell(step, parallel.micro_batch_num)
        for add in step.add_list:
            add.shard(((1,), (1,)))
    return _VirtualDatasetCell(step)


class ShardedTrainOneStep(GLMTrainOneStep):
    """`GLMTrainOneStep` on slices: only the norm of the gradients needs a sum over the cards.

    Args:
        network: of `spread`.
        optimizer: of the slices.
        copies: for each parameter of the optimizer, how many cards hold each of its elements.
        positions: of all rows of a step; with a loss scale that part of the loss sum is differentiated.
        max_grad_norm: as in `GLMTrainOneStep`.
        loss_scale: as in `GLMTrainOneStep`.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: Optimizer,
        copies: Sequence[int],
        positions: int,
        max_grad_norm: float | None = None,
        loss_scale: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, optimizer, max_grad_norm, loss_scale=loss_scale)
        self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)
        self.part = 1.0 / positions
        self.shares = tuple(1.0 / number for number in copies)
        self.sum_over_cards = ops.AllReduce()
        if self.loss_scale is not None:
            self.overflow = OverflowDetector(self.sum_over_cards)

    def differentiate(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss sum, number of labelled tokens and gradients of the loss sum of the whole step."""
        both = self.network(*inputs)
        scale = ops.ones_like(self.zero)
        if self.loss_scale is not None:
            scale = self.loss_scale.scale * self.part
        gradients = self.gradient(self.network, self.weights)(*inputs, ops.ones_like(both) * scale)
        both, gradients = self.gathered(both, gradients)
        loss, tokens = both[0], both[1]
        if self.loss_scale is not None:
            loss = self.overflow.watch(loss, gradients)
            gradients = self.scaled(gradients, 1.0 / scale)
        return loss, tokens, gradients

    def gathered(self, both: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss sum and token count [2] where every card has them, and whole gradients."""
        return both, gradients

    def squares(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Sum of the squares of all elements of the whole gradients, each counted once."""
        squares = self.zero
        for i in range(len(gradients)):
            square = self.square_sum(ops.square(ops.cast(gradients[i], ms.float32)))
            squares = squares + square * self.shares[i]
        return self.sum_over_cards(squares)


class PipelineTrainOneStep(ShardedTrainOneStep):
    """A step in which several micro batches are under way through the stages.

    The gradients of a card are those of its own stage; the last stage alone knows the loss.

    Args:
        network: of `spread`.
        optimizer: of the slices of this card's stage.
        copies: as in `ShardedTrainOneStep`.
        positions: as in `ShardedTrainOneStep`.
        parallel: stages and micro batches.
        rank: of this card.
        max_grad_norm: as in `GLMTrainOneStep`.
        loss_scale: as in `GLMTrainOneStep`.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: Optimizer,
        copies: Sequence[int],
        positions: int,
        parallel: ParallelConfig,
        rank: int,
        max_grad_norm: float | None = None,
        loss_scale: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, optimizer, copies, positions, max_grad_norm, loss_scale)
        self.network.add_flags(defer_inline=True)
        self.reducer = nn.PipelineGradReducer(optimizer.parameters)
        self.sum_over_stages = ops.AllReduce(group=_stage_group(parallel, rank))

    def gathered(self, both: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss from the last stage, the gradients of all micro batches."""
        gradients = self.reducer(gradients)
        return self.sum_over_stages(both), gradients


def _stage_group(parallel: ParallelConfig, rank: int) -> str:
    """The communication group of the cards that have the same place in every stage."""
    place = rank % parallel.stage_cards
    ranks = list(range(place, parallel.cards, parallel.stage_cards))
    name = f"glm_stages_{place}"
    create_group(name, ranks)
    return name
