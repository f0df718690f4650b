"""Top cells of compiled graphs."""

from __future__ import annotations

from mindspore import Tensor, nn

from glm_ms.model.glm import GLMNetwork


class Logits(nn.Cell):
    """The network under a top of its own: a new top is compiled anew, which a network that has changed needs.

    Args:
        network: weights; parameter names stay as they are.
    """

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, slots: Tensor
    ) -> Tensor:
        """As `GLMNetwork.construct`, without dropout."""
        return self.network(input_ids, attention_mask, position_ids, slots)
