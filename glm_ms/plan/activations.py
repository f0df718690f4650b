"""Bytes of intermediate results on one card, counted from the operators of the network.

A step keeps what derivatives need from the forward to the backward pass; each term below names the operator. The
backward pass of a block, or of the loss, adds temporary results. tests/plan/test_measured_memory.py compares the counts
with the memory statistics of MindSpore. Gaps between tensors are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig, kv_copies

_FLOAT32 = 4
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
    """What one card computes in one pass over a micro batch.

    Attributes:
        config: architecture.
        parallel: the split.
        rows: rows of a micro batch on this card.
        length: positions of a row.
        prefix: positions of a P-Tuning prefix before them.
        sharded: the network has sharding strategies.
        base_trained: the network's own weights have gradients.
        lora_targets: endings of the modules of a block that have a low-rank update, such as "mlp.dense_4h_to_h".
        lora_dropout: their inputs have dropout.
        fused_attention: one kernel, which keeps no scores.
        keeps_sums: recomputed blocks keep what was summed over the model-parallel cards for their derivatives.
    """

    config: GLMConfig
    parallel: ParallelConfig
    rows: int
    length: int
    prefix: int = 0
    sharded: bool = False
    base_trained: bool = True
    lora_targets: frozenset[str] = frozenset()
    lora_dropout: bool = False
    fused_attention: bool = False
    keeps_sums: bool = False

    @property
    def item(self) -> int:
        """Bytes of an element of the compute type."""
        return _FLOAT32 if self.config.compute_dtype == "float32" else 2

    @property
    def hidden(self) -> int:
        """Elements of hidden states [B, S, H]."""
        return self.rows * self.length * self.config.hidden_size

    @property
    def residual(self) -> int:
        """The same between two layers, which sequence parallelism splits."""
        split = self.parallel.model_parallel if self.parallel.use_seq_parallel else 1
        return self.hidden // split

    @property
    def query(self) -> int:
        """Elements of this card's queries."""
        return self.rows * self.length * self.config.query_size // self.parallel.model_parallel

    @property
    def key(self) -> int:
        """Elements of this card's keys."""
        heads = self.config.num_kv_heads * kv_copies(self.config, self.parallel)
        keys = self.rows * (self.prefix + self.length) * heads * self.config.kv_channels
        return keys // self.parallel.model_parallel

    @property
    def scores(self) -> int:
        """Elements of this card's attention scores."""
        if self.fused_attention:
            return 0
        pairs = self.rows * self.length * (self.prefix + self.length)
        return pairs * self.config.num_attention_heads // self.parallel.model_parallel

    @property
    def ffn(self) -> int:
        """Elements of one SwiGLU half on this card."""
        return self.rows * self.length * self.config.ffn_hidden_size // self.parallel.model_parallel

    @property
    def logits(self) -> int:
        """Elements of this card's logits."""
        return self.rows * self.length * self.config.padded_vocab_size // self.parallel.model_parallel


def needs_input(work: Work, module: str) -> bool:
    """Whether a gradient needs the input of a linear layer."""
    return work.base_trained or module in work.lora_targets


def norm_bytes(work: Work, following: tuple[str, ...]) -> int:
    """Bytes that a norm keeps, with the input of the linear layers after it."""
    kept = _FLOAT32 * work.residual  # its input, for the square and the product
    if work.base_trained and work.config.rmsnorm:
        kept += _FLOAT32 * work.residual  # the normalised rows, for the gradient of the scale
    if any(needs_input(work, module) for module in following):
        kept += work.item * work.hidden
    return kept


def attention_bytes(work: Work) -> int:
    """Bytes that attention keeps: queries, keys, values, weights, and the input of its last layer."""
    item, dropout = work.item, work.config.attention_dropout > 0
    weights = _FLOAT32 * work.scores  # softmax
    if item != _FLOAT32 or dropout:
        weights += item * work.scores  # cast, or with dropout, for the product with the values
    if dropout:
        weights += item * work.scores  # the dropout mask
    kept = item * (work.query + 2 * work.key) + weights
    return kept + (item * work.query if needs_input(work, "self_attention.dense") else 0)


def mlp_bytes(work: Work) -> int:
    """Bytes that the MLP keeps: gate, up, sigmoid, silu; and their product if the last layer's weight is trained."""
    arrays = 4 + needs_input(work, "mlp.dense_4h_to_h")
    return arrays * work.item * work.ffn


def dropout_bytes(work: Work) -> int:
    """Dropout masks of hidden states and of inputs of low-rank updates, with these inputs after dropout."""
    kept = 2 * work.item * work.residual if work.config.hidden_dropout > 0 else 0
    if work.lora_dropout:
        inputs = {"mlp.dense_4h_to_h": work.ffn, "self_attention.dense": work.query}
        kept += sum(2 * work.item * inputs.get(module, work.hidden) for module in work.lora_targets)
    return kept


def block_bytes(work: Work) -> int:
    """Bytes that one block keeps from the forward to the backward pass."""
    norms = norm_bytes(work, ("self_attention.query_key_value",)) + norm_bytes(work, ("mlp.dense_h_to_4h",))
    return norms + attention_bytes(work) + mlp_bytes(work) + dropout_bytes(work)


def backward_bytes(work: Work) -> int:
    """Peak of one block in its backward pass, including what it kept."""
    kept, gradient = block_bytes(work), work.item * work.hidden
    in_mlp = kept + _SWIGLU_BACKWARD * work.item * work.ffn
    in_attention = kept - mlp_bytes(work) + _SOFTMAX_BACKWARD * _FLOAT32 * work.scores
    return max(in_mlp, in_attention) + gradient


def loss_bytes(work: Work) -> int:
    """Peak of output layer and loss, including the last norm."""
    arrays = _SHARDED_LOSS_ARRAYS if work.sharded else _LOSS_ARRAYS
    half = work.item * work.logits if work.item != _FLOAT32 else 0
    return arrays * _FLOAT32 * work.logits + half + norm_bytes(work, ("output_layer",))


def bias_bytes(work: Work) -> int:
    """The attention bias, which all blocks share."""
    return _FLOAT32 * work.rows * work.length * (work.prefix + work.length)


def activation_bytes(
    work: Work, layers: int, in_flight: int = 1, recompute: bool = False, has_loss: bool = True
) -> int:
    """Peak of the intermediate results on one card in a training step.

    A stage keeps the results of its `layers` for `in_flight` micro batches at the same time; with `recompute` only the
    input of each block. The last stage `has_loss`, after the output layer.
    """
    sums = work.hidden if work.keeps_sums and work.parallel.model_parallel > 1 else 0
    kept_per_block = work.item * (work.residual + sums) if recompute else block_bytes(work)
    beyond = backward_bytes(work) - (0 if recompute else block_bytes(work))
    beyond = max(beyond, loss_bytes(work)) if has_loss else beyond
    return in_flight * layers * kept_per_block + beyond + bias_bytes(work)


def prefill_bytes(work: Work) -> int:
    """Peak of the intermediate results on one card while it reads prompts."""
    item = work.item
    in_attention = item * (2 * work.query + 2 * work.key) + (2 * _FLOAT32 + item) * work.scores
    in_mlp = 5 * item * work.ffn
    return max(in_attention, in_mlp) + 2 * _FLOAT32 * work.hidden + bias_bytes(work)
