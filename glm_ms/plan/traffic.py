"""Work and traffic of one training step: floating point operations, and bytes that a card sends."""

from __future__ import annotations

from collections.abc import Iterable

from glm_ms.model.config import GLMConfig
from glm_ms.plan.activations import Work
from glm_ms.plan.planned_parameters import FLOAT32, ITEM_BYTES, StoredPart


def forward_flops(config: GLMConfig, tokens: int, keys: int) -> tuple[int, int, int]:
    """Floating point operations of a forward pass: (of the blocks' linear layers, of attention, of the output layer).

    Two for each product of a weight with a token, and for each of a query, or of attention weights, with one of the
    `keys` that a token attends to; padding and masked pairs count too. Hoffmann et al. 2022, arXiv:2203.15556,
    appendix F.
    """
    linear = config.hidden_size * (config.qkv_size + config.query_size + 3 * config.ffn_hidden_size)
    passed = 2 * tokens * config.num_layers
    attention = passed * 2 * keys * config.query_size
    return passed * linear, attention, 2 * tokens * config.hidden_size * config.padded_vocab_size


def step_flops(config: GLMConfig, tokens: int, keys: int, base_trained: bool, recompute: bool) -> int:
    """Floating point operations of one update on all cards together.

    The backward pass costs as much as the forward pass for the gradients of the inputs, and as much again for those of
    the trained weights; both factors of an attention product have a gradient. Recomputed blocks run the forward pass
    twice.
    """
    linear, attention, head = forward_flops(config, tokens, keys)
    passes = 3 if base_trained else 2
    return passes * (linear + head) + 3 * attention + (linear + attention if recompute else 0)


def all_reduce_bytes(size: float, cards: int) -> float:
    """What each card sends when `size` bytes are summed over a ring; Patarasuk & Yuan 2009."""
    return 2 * size * (cards - 1) / cards


def gather_bytes(size: float, cards: int) -> float:
    """What each card sends when `size` bytes are gathered, or summed and scattered, over a ring."""
    return size * (cards - 1) / cards


def gradient_traffic(parts: Iterable[StoredPart]) -> float:
    """Bytes a card sends to sum float32 gradients: scattered over its optimizer shards, then over equal copies."""
    total = 0.0
    for part in parts:
        if part.parameter.trained:
            total += gather_bytes(FLOAT32 * part.whole, part.slice.shards)
            total += all_reduce_bytes(FLOAT32 * part.elements, part.slice.copies)
    return total


def weight_traffic(parts: Iterable[StoredPart], item: int, passes: int) -> float:
    """Bytes a card sends to gather weights that optimizer sharding splits; micro batches share them.

    Weights are sent in the compute type, of `item` bytes, in each of the `passes` of a step; the embedding is gathered
    once, in its storage type.
    """
    total = 0.0
    for part in parts:
        size = part.parameter.item_bytes if ".embedding." in part.name else passes * item
        total += gather_bytes(size * part.whole, part.slice.shards)
    return total


def tensor_traffic(work: Work, layers: int, recompute: bool, first: bool, last: bool) -> float:
    """Bytes a card sends over its model-parallel group for one micro batch.

    A block sums its hidden states twice in the forward pass and twice in the backward pass (Shoeybi et al. 2019,
    arXiv:1909.08053); with sequence parallelism a sum is a scattered sum and a gathering, which send as much, and the
    output layer gathers once more. A recomputed block sums once more, after attention (the sum after the MLP is of no
    use to its derivatives), and gathers twice more. The `first` stage has the embedding, the `last` the output layer.
    """
    parallel, hidden = work.parallel, work.item * work.hidden
    ways = parallel.model_parallel
    if ways == 1:
        return 0.0
    again = (1.5 if parallel.use_seq_parallel else 1.0) if recompute and not work.keeps_sums else 0.0
    sums = layers * (4 + again) + (1 if last and parallel.use_seq_parallel else 0)
    total = sums * all_reduce_bytes(hidden, ways)
    if first and not parallel.vocab_emb_dp:  # of rows as they are stored
        stored = ITEM_BYTES[work.config.param_init_type] * work.hidden
        total += 2 * all_reduce_bytes(stored, ways)
    if last:  # maximum, sum and picked score of every row, and two gradients
        total += 5 * all_reduce_bytes(FLOAT32 * work.rows * work.length, ways)
    return total


def stage_traffic(work: Work, stage: int) -> float:
    """Bytes a card sends to the neighbouring stages for one micro batch: hidden states forward, gradients back."""
    neighbours = (stage > 0) + (stage < work.parallel.pipeline_stages - 1)
    return neighbours * work.item * work.residual
