"""The part of every parameter that each card stores, by rule. Tests compare the rules with MindSpore's compiler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig, kv_copies

# Optimizer sharding does not cut parameters below this size (before any cut): gathering them costs more than it saves.
# MindSpore's default, in KB as in its setting.
OPTIMIZER_SHARD_THRESHOLD_KB = 64
_BLOCK = "encoder.layers."


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that one card stores.

    Attributes:
        full: shape of the whole.
        axis, ways: the axis cut by model parallelism (None: not cut), and its pieces.
        shards: pieces of axis 0 of such a piece, by optimizer sharding.
        stage, stage_cards: pipeline stage, and its cards.
    """

    full: tuple[int, ...]
    axis: int | None
    ways: int
    shards: int
    stage: int
    stage_cards: int

    @property
    def shape(self) -> tuple[int, ...]:
        """What a card stores."""
        shape = list(self.full)
        if self.axis is not None:
            shape[self.axis] //= self.ways
        shape[0] //= self.shards
        return tuple(shape)

    @property
    def copies(self) -> int:
        """Cards that store each element."""
        return self.stage_cards // (self.ways * self.shards)


def parameter_slices(
    config: GLMConfig, parallel: ParallelConfig, shapes: Mapping[str, tuple[int, ...]], item_bytes: Mapping[str, float]
) -> dict[str, Slice]:
    """The slice of every parameter of a sharded network.

    Args:
        shapes: name -> whole shape, joint layers in parts (`sharded_shapes`); with those of an adapter.
        item_bytes: name -> bytes of an element.
    """
    slices = {}
    for name, shape in shapes.items():
        axis, ways = _tensor_cut(name, config, parallel)
        rows = shape[0] // ways if axis == 0 else shape[0]
        group, size = parallel.stage_cards // ways, item_bytes[name] * math.prod(shape)
        sharded = parallel.optimizer_shard and size >= OPTIMIZER_SHARD_THRESHOLD_KB * 1024 and rows % group == 0
        shards = group if sharded else 1
        stage = stage_of_parameter(name, config, parallel)
        slices[name] = Slice(tuple(shape), axis, ways, shards, stage, parallel.stage_cards)
    return slices


def sharded_shapes(config: GLMConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters -> those of a sharded network, which has joint layers in parts."""
    result = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parts = next((p for joint, p in config.joint_parts.items() if module.endswith(joint)), None)
        if parts is None:
            result[name] = tuple(shape)
        else:
            result.update({f"{module}.{part}.{kind}": (rows, *shape[1:]) for part, rows in parts.items()})
    return result


def stage_of_parameter(name: str, config: GLMConfig, parallel: ParallelConfig) -> int:
    """The pipeline stage of a parameter."""
    if _BLOCK in name:
        block = int(name.partition(_BLOCK)[2].partition(".")[0])
        return parallel.stage_of(block, config.num_layers)
    first = ".embedding." in name or "prefix_encoder" in name
    return 0 if first else parallel.pipeline_stages - 1


def _tensor_cut(name: str, config: GLMConfig, parallel: ParallelConfig) -> tuple[int | None, int]:
    """(axis, ways) of the cut by model parallelism."""
    ways = parallel.model_parallel
    if ways == 1:
        return None, 1
    if ".embedding." in name:
        return (None, 1) if parallel.vocab_emb_dp else (0, ways)
    by_rows = ".self_attention.dense." in name or ".mlp.dense_4h_to_h." in name
    if "lora_" in name:  # A follows the inputs of its layer, B is whole
        return (1, ways) if by_rows and "lora_A" in name else (None, 1)
    if by_rows:
        return (1, ways) if name.endswith("weight") else (None, 1)
    if ".query_key_value.key." in name or ".query_key_value.value." in name:
        return (0, ways) if kv_copies(config, parallel) == 1 else (None, 1)
    columns = (".query_key_value.query.", ".dense_h_to_4h.", ".output_layer.")
    return (0, ways) if any(part in name for part in columns) else (None, 1)
