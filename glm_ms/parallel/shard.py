"""`shard_glm`: a network as it is -> a network whose weights and work are split over cards."""

from __future__ import annotations

from mindspore import Parameter, nn

from glm_ms.model.glm import GLMBlock, GLMNetwork
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.layers import FlatEmbedding, FlatRows, ShardedAttention, ShardedMLP
from glm_ms.parallel.strategies import Strategies


def shard_glm(network: GLMNetwork, parallel: ParallelConfig) -> None:
    """Attaches strategies to every operator of a network, in place, and gives its cells a pipeline stage.

    Call it in semi-automatic parallel mode, with adapters attached and before weights are loaded: joint weights
    (query-key-value, the first of the MLP) are replaced by their parts, see `GLMConfig.joint_parts`, which begin at
    random, and are frozen where the base is. Parameters of adapters stay.

    Args:
        network: not compiled yet; afterwards it takes batches and gives logits of two axes, [B * S, V].
        parallel: a split without `parallel_problems`.
    """
    glm, config = network.transformer, network.config
    names = {id(parameter): (parameter, parameter.name) for parameter in network.get_parameters()}
    trained = glm.embedding.embedding_table.requires_grad  # False under an adapter
    glm.embedding = FlatEmbedding(config)
    _flatten_lora(glm.output_layer)
    for index, layer in enumerate(glm.encoder.layers):
        _replace_cells(layer, index, network, parallel)
    _restore_names(network, names)
    for parameter in network.get_parameters():
        if id(parameter) not in names:
            parameter.requires_grad = trained
    _attach(network, Strategies(parallel))
    set_stages(network, parallel)


def set_stages(network: GLMNetwork, parallel: ParallelConfig) -> None:
    """The embedding and the first blocks in the first pipeline stage, the output layer in the last."""
    if parallel.pipeline_stages == 1:
        return
    glm, last = network.transformer, parallel.pipeline_stages - 1
    glm.embedding.pipeline_stage = 0
    for index, layer in enumerate(glm.encoder.layers):
        layer.pipeline_stage = parallel.stage_of(index, len(glm.encoder.layers))
    if glm.encoder.final_layernorm is not None:
        glm.encoder.final_layernorm.pipeline_stage = last
    glm.output_layer.pipeline_stage = last


def _replace_cells(layer: GLMBlock, index: int, network: GLMNetwork, parallel: ParallelConfig) -> None:
    config = network.config
    attention, mlp = ShardedAttention(config, index, parallel), ShardedMLP(config)
    pairs = (
        (layer.self_attention.query_key_value, attention.query_key_value),
        (layer.self_attention.dense, attention.dense),
        (layer.mlp.dense_h_to_4h, mlp.dense_h_to_4h),
        (layer.mlp.dense_4h_to_h, mlp.dense_4h_to_h),
    )
    for old, new in pairs:
        new.lora = old.lora
        _flatten_lora(new)
    layer.self_attention, layer.mlp = attention, mlp
    if layer.dropouts:
        layer.drop_attention = FlatRows(layer.drop_attention, config.hidden_size)
        layer.drop_mlp = FlatRows(layer.drop_mlp, config.hidden_size)


def _flatten_lora(linear: nn.Cell) -> None:
    if linear.lora is not None:
        linear.lora = FlatRows(linear.lora, linear.out_features)


def _restore_names(network: GLMNetwork, names: dict[int, tuple[Parameter, str]]) -> None:
    """Attaching a cell names its parameters by their place in the cell it is attached to."""
    for place, parameter in network.parameters_and_names():
        parameter.name = names[id(parameter)][1] if id(parameter) in names else place


def _attach(network: GLMNetwork, strategies: Strategies) -> None:
    glm, d, m = network.transformer, strategies.d, strategies.m
    strategies.embedding(glm.embedding)
    strategies.bias(glm.attention_bias)
    glm.gather.shard(((1, 1), (d, 1)))
    glm.expand.shard(((d, 1, 1),))
    glm.join_slots.shard(((1,), (1,)))
    glm.join_masks.shard(((d, 1), (d, 1)))
    if glm.prefix_encoder is not None:
        strategies.prefix(glm.prefix_encoder)
    for layer in glm.encoder.layers:
        strategies.block(layer)
    if glm.encoder.final_layernorm is not None:
        strategies.rows(glm.encoder.final_layernorm)
    strategies.by_columns(glm.output_layer)
    network.cast.shard(((d, m),))
