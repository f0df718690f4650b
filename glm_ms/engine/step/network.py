"""The network and its loss as one cell, which the training step differentiates."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.glm import GLMNetwork
from glm_ms.model.loss import WholeLoss, loss_of
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import VocabularyParallelLoss
from glm_ms.parallel.strategies import attach_strategies
from glm_ms.settings import Settings


class TrainingNetwork(nn.Cell):
    """Loss of a batch of rows of at most `seq_length` tokens; parameter names are those of the network.

    `loss` is (input of the output layer, labels, seeds of dropout) -> (loss sum, number of labelled tokens).
    """

    def __init__(self, network: GLMNetwork, seq_length: int, loss: nn.Cell | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.config = network.config
        self.seq_length = seq_length
        self.network = network
        self.loss = loss_of(network) if loss is None else loss
        self.slots = Tensor(np.arange(seq_length, dtype=np.int32))

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        dropout_seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All int32 [B, S], seeds int32 [B] or None for no dropout -> (loss sum, number of labelled tokens),
        float32 scalars."""
        slots = self.slots[: ops.shape(input_ids)[1]]
        hidden = self.network.transformer(input_ids, attention_mask, position_ids, slots, dropout_seeds)
        return self.loss(hidden, labels, dropout_seeds)

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """MindFormers lists the parameters in its log through this method."""
        return self.trainable_params() if only_trainable else list(self.get_parameters())


class ShardedTrainingNetwork(TrainingNetwork):
    """Loss of a global batch, split over the cards.

    `network` is that of `glm_ms.parallel.layers.sharded_glm`, with its adapter if it has one.
    """

    def __init__(self, network: GLMNetwork, parallel: ParallelConfig, seq_length: int) -> None:
        attach_strategies(network, parallel)
        loss = VocabularyParallelLoss(network.config.padded_vocab_size, parallel)
        if parallel.pipeline_stages > 1:
            loss.pipeline_stage = parallel.pipeline_stages - 1
        super().__init__(network, seq_length, WholeLoss(network, loss))


def recompute_blocks(network: GLMNetwork, settings: Settings) -> None:
    """Makes every block keep only its input for the backward pass, if the settings ask for it."""
    recompute = settings.recompute_config
    if recompute.recompute:
        for layer in network.transformer.encoder.layers:
            layer.recompute(mp_comm_recompute=recompute.mp_comm_recompute)
