"""Training steps for networks whose weights MindSpore's parallel compiler splits over the cards.

The compiler inserts the sums over what the strategies split: every card gets the whole loss and token count, and the
gradient of the whole batch for its slice of each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import create_group
from mindspore.nn import Optimizer

from glm_ms.engine.mindformers_internals import VirtualDatasetCell
from glm_ms.engine.step.train_step import TrainOneStep
from glm_ms.parallel.config import ParallelConfig


class Stacked(nn.Cell):
    """Loss sum and token count as one tensor.

    A pipeline adds one tensor over its micro batches. And the compiler divides a derivative by the number of cards that
    have the same output only if the network has one output; with several, every gradient would be that many times too
    large.

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
    """A network whose inputs are distributed over the cards and, with pipeline stages, over micro batches.

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
    return VirtualDatasetCell(step)


class ShardedTrainOneStep(TrainOneStep):
    """A training step on slices: only the norm of the gradients needs a sum over the cards.

    With pipeline stages several micro batches are in the pipeline at the same time; the gradients of a card are those
    of its own stage, and only the last stage knows the loss.

    Args:
        network: of `spread`.
        optimizer: of the slices, with pipeline stages of this card's stage.
        copies: for each parameter of the optimizer, how many cards have each of its elements.
        positions: tokens of all rows of a step, padding included; with loss scaling, the loss sum divided by it is
            differentiated.
        parallel: stages and micro batches.
        rank: of this card.
        max_grad_norm, loss_scale: as in `TrainOneStep`.
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
        super().__init__(network, optimizer, ops.AllReduce(), max_grad_norm, loss_scale)
        self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)
        self.part = 1.0 / positions
        self.shares = tuple(1.0 / number for number in copies)
        self.has_stages = parallel.pipeline_stages > 1
        if self.has_stages:
            self.network.add_flags(defer_inline=True)
            self.reducer = nn.PipelineGradReducer(optimizer.parameters)
            self.all_reduce_stages = ops.AllReduce(group=_stage_group(parallel, rank))

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One whole step; returns what `finish` returns."""
        both = self.network(*inputs)
        scale = ops.ones_like(self.zero)
        if self.loss_scale is not None:
            scale = self.loss_scale.scale * self.part
        gradients = self.gradient(self.network, self.weights)(*inputs, ops.ones_like(both) * scale)
        if self.has_stages:
            gradients = self.reducer(gradients)
            both = self.all_reduce_stages(both)
        loss, tokens = both[0], both[1]
        if self.loss_scale is not None:
            loss = self.overflow.watch(loss, gradients)
            gradients = self.scaled(gradients, 1.0 / scale)
        return self.finish(loss, tokens, gradients)

    def squares(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Sum of the squares of all elements of the whole gradients, each counted once."""
        squares = self.zero
        for i in range(len(gradients)):
            square = self.square_sum(ops.square(ops.cast(gradients[i], ms.float32)))
            squares = squares + square * self.shares[i]
        return self.all_reduce(squares)


def _stage_group(parallel: ParallelConfig, rank: int) -> str:
    """The communication group of the cards that have the same place in every stage."""
    place = rank % parallel.stage_cards
    ranks = list(range(place, parallel.cards, parallel.stage_cards))
    name = f"glm_stages_{place}"
    create_group(name, ranks)
    return name
