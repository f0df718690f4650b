"""How work is split over cards, and which networks a split does not fit. No MindSpore."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glm_ms.model.config import GLMConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How many ways each dimension of the work is split.

    Args:
        data_parallel: ways the batch is split.
        model_parallel: ways every large weight is split: heads, MLP channels, vocabulary.
        pipeline_stages: stages that the blocks are spread over.
        micro_batch_num: micro batches in flight with more than one stage.
        vocab_emb_dp: the embedding is copied to every card; False: its rows are split by `model_parallel`.
        use_seq_parallel: norms, residuals and dropout are also split over the model-parallel cards, by positions.
            Korthikanti et al. 2022, arXiv:2205.05198.
        optimizer_shard: weights, gradients and moments are also split over the cards that otherwise store equal
            copies. Rajbhandari et al. 2020, arXiv:1910.02054.
    """

    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stages: int = 1
    micro_batch_num: int = 1
    vocab_emb_dp: bool = True
    use_seq_parallel: bool = False
    optimizer_shard: bool = False

    @property
    def cards(self) -> int:
        """Cards of a run."""
        return self.stage_cards * self.pipeline_stages

    @property
    def stage_cards(self) -> int:
        """Cards of one pipeline stage."""
        return self.data_parallel * self.model_parallel

    @property
    def row_split(self) -> int:
        """Ways the rows of hidden states are split between two layers."""
        return self.stage_cards if self.use_seq_parallel else self.data_parallel

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The pipeline stage of a block. Later stages get the remainder, since the first has the embedding."""
        short, longer = divmod(num_layers, self.pipeline_stages)
        first_long = self.pipeline_stages - longer
        if layer < first_long * short:
            return layer // short
        return first_long + (layer - first_long * short) // (short + 1)


def kv_copies(config: GLMConfig, parallel: ParallelConfig) -> int:
    """How often each key/value head is repeated, so that every model-parallel card has one."""
    return max(1, parallel.model_parallel // config.num_kv_heads)


def parallel_problems(
    config: GLMConfig, parallel: ParallelConfig, rows: int, seq_length: int
) -> Iterator[tuple[str, str]]:
    """Why a split does not fit a network: (field of `ParallelConfig`, reason) for every problem.

    `rows` are those of one micro batch over all data-parallel cards.
    """
    ways, data, split = parallel.model_parallel, parallel.data_parallel, parallel.row_split
    stages, micro = parallel.pipeline_stages, parallel.micro_batch_num
    groups, positions = config.num_kv_heads, rows * seq_length
    if not config.multi_query_attention:
        yield "model_parallel", "multi_query_attention: False has no sharding strategies"
    for name in ("num_attention_heads", "ffn_hidden_size", "padded_vocab_size"):
        size = getattr(config, name)
        if size % ways:
            yield "model_parallel", f"{name} = {size} is not divisible by model_parallel = {ways}"
    if groups % ways and ways % groups:
        reason = f"{groups} key/value heads and model_parallel = {ways}: one must be divisible by the other"
        yield "model_parallel", reason
    if rows % data:
        yield "data_parallel", f"a batch of {rows} rows is not divisible by data_parallel = {data}"
    if parallel.use_seq_parallel and positions % split:
        reason = f"{positions} is not divisible by data_parallel x model_parallel = {split}"
        yield "use_seq_parallel", f"{rows} rows x {seq_length} positions = {reason}"
    if parallel.use_seq_parallel and ways == 1:
        yield "use_seq_parallel", "True needs model_parallel above 1"
    if stages > config.num_layers:
        yield "pipeline_stages", f"{stages} stages for num_layers = {config.num_layers} blocks"
    if stages > 1 and micro < stages:
        yield "micro_batch_num", f"{micro} is below pipeline_stage = {stages}, so that some stage is always idle"
    if stages == 1 and micro > 1:
        yield "micro_batch_num", f"{micro} has no effect with pipeline_stage = 1"
