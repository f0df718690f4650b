"""The network as the MindFormers Trainer wants it."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn

from glm_ms.model.glm import GLMNetwork
from glm_ms.model.loss import GLMWithLoss
from glm_ms.settings import Settings


class TrainingNetwork(nn.Cell):
    """Loss of a batch of fixed length.

    Args:
        network: weights; parameter names stay as they are.
        seq_length: length of every row.
    """

    def __init__(self, network: GLMNetwork, seq_length: int) -> None:
        super().__init__(auto_prefix=False)
        self.config = network.config
        self.with_loss = GLMWithLoss(network)
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
        return self.with_loss(input_ids, labels, attention_mask, position_ids, self.slots, dropout_seeds)

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """MindFormers lists the parameters in its log through this method."""
        return self.trainable_params() if only_trainable else list(self.get_parameters())


def recompute_blocks(network: GLMNetwork, settings: Settings) -> None:
    """Lets every block of a network keep its input alone, where the settings say so."""
    recompute = settings.recompute_config
    if not recompute.recompute:
        return
    for layer in network.transformer.encoder.layers:
        layer.recompute(mp_comm_recompute=recompute.mp_comm_recompute)
