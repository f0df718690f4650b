"""What one card keeps, computes and sends in a step, counted from the operators of the network.

A step keeps what derivatives need from the forward to the backward pass; each term names the operator. The backward
pass of a block, or of the loss, adds temporary results. tests/plan/test_measured_memory.py compares the bytes with the
memory statistics of MindSpore. Gaps between tensors are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig, kv_copies
from glm_ms.plan.planned_parameters import FLOAT32, ITEM_BYTES, StoredPart

# Float32 arrays of the size of the scores in the derivative of softmax: of its output and of its input.
_SOFTMAX_BACKWARD = 2
# Arrays of the MLP's width in the derivative of SwiGLU, in addition to those of the forward pass.
_SWIGLU_BACKWARD = 2
# Float32 arrays of the size of the logits: logits, log probabilities, gradient.
_LOSS_ARRAYS = 3
# With a split vocabulary: exponentials, one-hot labels, two gradients and their sum.
_SHARDED_LOSS_ARRAYS = 5


@dataclass(frozen=True)
class Work:
    """What one card computes in one pass over a micro batch. The properties are numbers of elements on this card."""

    config: GLMConfig
    parallel: ParallelConfig
    rows: int  # of a micro batch on this card
    length: int  # positions of a row
    prefix: int = 0  # positions of a P-Tuning prefix before them
    sharded: bool = False  # the network has sharding strategies
    base_trained: bool = True  # the network's own weights have gradients
    lora_targets: frozenset[str] = frozenset()  # modules of a block with a low-rank update: "mlp.dense_4h_to_h"
    lora_dropout: bool = False  # on the inputs of these updates
    fused_kernels: bool = False  # Ascend's, see `glm_ms.ops.registry`
    keeps_sums: bool = False  # recomputed blocks keep what was summed over the model-parallel cards

    @property
    def item(self) -> int:
        """Bytes of an element of the compute type."""
        return ITEM_BYTES[self.config.compute_dtype]

    @property
    def hidden(self) -> int:
        """Hidden states [B, S, H]."""
        return self.rows * self.length * self.config.hidden_size

    @property
    def residual(self) -> int:
        """Hidden states between two layers, which sequence parallelism splits."""
        return self.hidden // (self.parallel.model_parallel if self.parallel.use_seq_parallel else 1)

    @property
    def query(self) -> int:
        return self._part(self.config.query_size)

    @property
    def key(self) -> int:
        heads = self.config.num_kv_heads * kv_copies(self.config, self.parallel)
        keys = self.rows * (self.prefix + self.length) * heads * self.config.kv_channels
        return keys // self.parallel.model_parallel

    @property
    def scores(self) -> int:
        if self.fused_kernels and self.item < FLOAT32 and not self.config.attention_dropout:
            return 0  # attention is one kernel, which keeps none
        return self._part((self.prefix + self.length) * self.config.num_attention_heads)

    @property
    def ffn(self) -> int:
        """One SwiGLU half."""
        return self._part(self.config.ffn_hidden_size)

    @property
    def logits(self) -> int:
        return self._part(self.config.padded_vocab_size)

    def _part(self, width: int) -> int:
        return self.rows * self.length * width // self.parallel.model_parallel

    def needs_input(self, module: str) -> bool:
        """Whether a gradient needs the input of a linear layer."""
        return self.base_trained or module in self.lora_targets


def _norm_bytes(work: Work, following: str) -> int:
    """Bytes that a norm keeps, with the input of the linear layer after it."""
    kept = FLOAT32 * work.residual  # its input, for the square and the product
    if work.base_trained and work.config.rmsnorm:
        kept += FLOAT32 * work.residual  # the normalised rows, for the gradient of the scale
    if work.needs_input(following):
        kept += work.item * work.hidden
    return kept


def _attention_bytes(work: Work) -> int:
    """Bytes that attention keeps: queries, keys, values, weights, and the input of its last layer."""
    item, dropout = work.item, work.config.attention_dropout > 0
    weights = FLOAT32 * work.scores  # softmax
    if item != FLOAT32 or dropout:
        weights += item * work.scores  # cast, or with dropout, for the product with the values
    if dropout:
        weights += item * work.scores  # the dropout mask
    kept = item * (work.query + 2 * work.key) + weights
    return kept + (item * work.query if work.needs_input("self_attention.dense") else 0)


def _mlp_bytes(work: Work) -> int:
    """Bytes that the MLP keeps: gate, up, sigmoid, silu; and their product if the last layer's weight is trained."""
    return (4 + work.needs_input("mlp.dense_4h_to_h")) * work.item * work.ffn


def _dropout_bytes(work: Work) -> int:
    """Dropout masks of hidden states and of inputs of low-rank updates, with these inputs after dropout."""
    kept = 2 * work.item * work.residual if work.config.hidden_dropout > 0 else 0
    if work.lora_dropout:
        inputs = {"mlp.dense_4h_to_h": work.ffn, "self_attention.dense": work.query}
        kept += sum(2 * work.item * inputs.get(module, work.hidden) for module in work.lora_targets)
    return kept


def _block_bytes(work: Work) -> int:
    """Bytes that one block keeps from the forward to the backward pass."""
    norms = _norm_bytes(work, "self_attention.query_key_value") + _norm_bytes(work, "mlp.dense_h_to_4h")
    return norms + _attention_bytes(work) + _mlp_bytes(work) + _dropout_bytes(work)


def _backward_bytes(work: Work) -> int:
    """Peak of one block in its backward pass, including what it kept."""
    kept, gradient = _block_bytes(work), work.item * work.hidden
    in_mlp = kept + _SWIGLU_BACKWARD * work.item * work.ffn
    in_attention = kept - _mlp_bytes(work) + _SOFTMAX_BACKWARD * FLOAT32 * work.scores
    return max(in_mlp, in_attention) + gradient


def _loss_bytes(work: Work) -> int:
    """Peak of output layer and loss, including the last norm."""
    arrays = _SHARDED_LOSS_ARRAYS if work.sharded else _LOSS_ARRAYS
    half = work.item * work.logits if work.item != FLOAT32 else 0
    return arrays * FLOAT32 * work.logits + half + _norm_bytes(work, "output_layer")


def _bias_bytes(work: Work) -> int:
    """The attention bias, which all blocks share."""
    return FLOAT32 * work.rows * work.length * (work.prefix + work.length)


def activation_bytes(work: Work, layers: int, in_flight: int, recompute: bool, has_loss: bool) -> int:
    """Peak of the intermediate results on one card in a training step.

    A stage keeps the results of its `layers` for `in_flight` micro batches at the same time; with `recompute` only the
    input of each block. The last stage `has_loss`, after the output layer.
    """
    sums = work.hidden if work.keeps_sums and work.parallel.model_parallel > 1 else 0
    kept_per_block = work.item * (work.residual + sums) if recompute else _block_bytes(work)
    beyond = _backward_bytes(work) - (0 if recompute else _block_bytes(work))
    beyond = max(beyond, _loss_bytes(work)) if has_loss else beyond
    return in_flight * layers * kept_per_block + beyond + _bias_bytes(work)


def prefill_bytes(work: Work) -> int:
    """Peak of the intermediate results on one card while it reads prompts."""
    in_attention = work.item * (2 * work.query + 2 * work.key) + (2 * FLOAT32 + work.item) * work.scores
    in_mlp = 5 * work.item * work.ffn
    return max(in_attention, in_mlp) + 2 * FLOAT32 * work.hidden + _bias_bytes(work)


def step_flops(config: GLMConfig, tokens: int, keys: int, base_trained: bool, recompute: bool) -> int:
    """Floating point operations of one update on all cards together.

    Two for each product of a weight with a token, and for each of a query, or of attention weights, with one of the
    `keys` that a token attends to; padding and masked pairs count too. Hoffmann et al. 2022, arXiv:2203.15556,
    appendix F. The backward pass costs as much as the forward pass for the gradients of the inputs, and as much again
    for those of the trained weights; both factors of an attention product have a gradient. Recomputed blocks run the
    forward pass twice.
    """
    width = config.hidden_size * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size)
    linear = 2 * tokens * config.num_layers * width
    attention = 2 * tokens * config.num_layers * 2 * keys * config.query_size
    head = 2 * tokens * config.hidden_size * config.padded_vocab_size
    passes = 3 if base_trained else 2
    return passes * (linear + head) + 3 * attention + (linear + attention if recompute else 0)


def _all_reduce_bytes(size: float, cards: int) -> float:
    """What each card sends when `size` bytes are summed over a ring; Patarasuk & Yuan 2009."""
    return 2 * _gather_bytes(size, cards)


def _gather_bytes(size: float, cards: int) -> float:
    """What each card sends when `size` bytes are gathered, or summed and scattered, over a ring."""
    return size * (cards - 1) / cards


def gradient_traffic(parts: Iterable[StoredPart]) -> float:
    """Bytes a card sends to sum float32 gradients: scattered over its optimizer shards, then over equal copies."""
    total = 0.0
    for part in parts:
        if part.parameter.trained:
            total += _gather_bytes(FLOAT32 * part.whole, part.slice.shards)
            total += _all_reduce_bytes(FLOAT32 * part.elements, part.slice.copies)
    return total


def weight_traffic(parts: Iterable[StoredPart], item: int, passes: int) -> float:
    """Bytes a card sends to gather weights that optimizer sharding splits; micro batches share them.

    Weights are sent in the compute type, of `item` bytes, in each of the `passes` of a step; the embedding is gathered
    once, in its storage type.
    """
    total = 0.0
    for part in parts:
        size = part.parameter.item_bytes if ".embedding." in part.name else passes * item
        total += _gather_bytes(size * part.whole, part.slice.shards)
    return total


def tensor_traffic(work: Work, layers: int, recompute: bool, first: bool, last: bool) -> float:
    """Bytes a card sends over its model-parallel group for one micro batch.

    A block sums its hidden states twice in the forward pass and twice in the backward pass (Shoeybi et al. 2019,
    arXiv:1909.08053); with sequence parallelism a sum is a scattered sum and a gathering, which send as much, and the
    output layer gathers once more. A recomputed block sums once more, after attention (the sum after the MLP is of no
    use to its derivatives), and gathers twice more. The `first` stage has the embedding, the `last` the output layer.
    """
    ways, sequences = work.parallel.model_parallel, work.parallel.use_seq_parallel
    if ways == 1:
        return 0.0
    again = (1.5 if sequences else 1.0) if recompute and not work.keeps_sums else 0.0
    sums = layers * (4 + again) + (1 if last and sequences else 0)
    total = sums * _all_reduce_bytes(work.item * work.hidden, ways)
    if first and not work.parallel.vocab_emb_dp:  # of rows as they are stored
        total += 2 * _all_reduce_bytes(ITEM_BYTES[work.config.param_init_type] * work.hidden, ways)
    if last:  # maximum, sum and picked score of every row, and two gradients
        total += 5 * _all_reduce_bytes(FLOAT32 * work.rows * work.length, ways)
    return total


def stage_traffic(work: Work, stage: int) -> float:
    """Bytes a card sends to the neighbouring stages for one micro batch: hidden states forward, gradients back."""
    neighbours = (stage > 0) + (stage < work.parallel.pipeline_stages - 1)
    return neighbours * work.item * work.residual
