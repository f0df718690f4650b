"""The network and its loss as one cell, which the training step differentiates."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.engine.step.packing import PackRows, packs
from glm_ms.model.glm import MLP, GLMNetwork, SelfAttention
from glm_ms.model.layers import Linear, Norm
from glm_ms.model.loss import WholeLoss, training_loss
from glm_ms.ops.portable import ApplyRotary, GroupedAttention, RMSNormalize, SwiGLU
from glm_ms.ops.registry import step_kernel
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import VocabularyParallelLoss
from glm_ms.parallel.strategies import attach_strategies
from glm_ms.settings import Settings


class TrainingNetwork(nn.Cell):
    """Loss of a batch of rows of at most `seq_length` tokens; parameter names are those of the network.

    `loss` is (input of the output layer, labels, seeds of dropout) -> (loss sum, number of labelled tokens).
    `bfloat16` is for a network of float32 on a CPU, see `use_bfloat16_products`.
    """

    def __init__(
        self, network: GLMNetwork, seq_length: int, loss: nn.Cell | None = None, bfloat16: bool = False
    ) -> None:
        super().__init__(auto_prefix=False)
        if loss is None and network.config.compute_dtype == "float32":  # strategies are for portable operators
            fuse_cells(network)
        if bfloat16:
            use_bfloat16_products(network)
        self.config = network.config
        self.seq_length = seq_length
        self.network = network
        self.loss = training_loss(network, bfloat16) if loss is None else loss
        self.pack_rows = PackRows() if packs(network, self.loss) else None
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
        if self.pack_rows is not None:
            return self.packed_loss(*self.pack_rows(input_ids, labels, attention_mask, position_ids, dropout_seeds))
        slots = self.key_slots(input_ids)
        hidden = self.network.transformer(input_ids, attention_mask, position_ids, slots, dropout_seeds)
        return self.loss(hidden, labels, dropout_seeds)

    def packed_loss(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor, rows: Tensor, seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What `PackRows` gives -> as `construct`."""
        hidden = self.network.transformer.run_blocks(input_ids, position_ids, rows, seeds)
        return self.loss.of_targets(ops.reshape(hidden, (-1, self.config.hidden_size)), targets)

    def key_slots(self, input_ids: Tensor) -> Tensor:
        """int32 [S], the places of the tokens of a row. Batches are cut at their longest row."""
        return self.slots[: ops.shape(input_ids)[1]]

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

    def key_slots(self, input_ids: Tensor) -> Tensor:
        """int32 [S]. Rows are not cut here: the compiler would divide a slice among the cards and gather it again."""
        return self.slots


def fuse_cells(network: GLMNetwork) -> None:
    """Replaces norms, activations, rotation, attention and biases of a float32 network by the kernels of this device,
    if it has them."""
    for _, parent in list(network.cells_and_names()):
        if type(parent) is Norm and parent.weight.dtype == ms.float32:
            _replace(parent, "normalize", RMSNormalize, "RMS norm")
        elif type(parent) is MLP and parent.dense_h_to_4h.dtype == ms.float32:
            _replace(parent, "activation", SwiGLU, "SwiGLU")
        elif type(parent) is SelfAttention:
            _replace(parent, "rotary", ApplyRotary, "rotary embedding")
            if getattr(parent.attention, "dropout", None) is None:  # the kernel has none
                _replace(parent, "attention", GroupedAttention, "attention")
    add_bias = step_kernel("bias")
    for layer in network.linears().values():
        if add_bias is not None and type(getattr(layer, "bias_add", None)) is ops.Add and layer.dtype == ms.float32:
            layer.bias_add = add_bias()


def _replace(parent: nn.Cell, place: str, portable: type, operator: str) -> None:
    kernel, cell = step_kernel(operator), getattr(parent, place)
    if kernel is not None and type(cell) is portable:
        setattr(parent, place, kernel(cell))


def use_bfloat16_products(network: GLMNetwork) -> None:
    """Makes the plain linear layers of a float32 network round weights, inputs and gradients to bfloat16 as operands.

    Sums, weights and everything between the products stay float32. Quantized layers and updates of LoRA stay as they
    are. Raises ValueError if the device has no kernel for it.
    """
    product = step_kernel("bfloat16 product")
    if product is None:
        raise ValueError("compute_dtype bfloat16: only an Ascend card, or a CPU with the C++ kernels, computes in it")
    for layer in network.linears().values():
        if type(layer) is Linear:
            layer.matmul = product()


def recompute_blocks(network: GLMNetwork, settings: Settings) -> None:
    """Makes every block keep only its input for the backward pass, if the settings ask for it."""
    recompute = settings.recompute_config
    if recompute.recompute:
        for layer in network.transformer.encoder.layers:
            layer.recompute(mp_comm_recompute=recompute.mp_comm_recompute)
