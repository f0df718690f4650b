"""A sharded network on one card: its operators do the whole work, and their strategies are left unread."""

from __future__ import annotations

from glm_ms.model.glm import GLMNetwork
from glm_ms.model.layers import DTYPES
from glm_ms.ops.portable import ApplyRotary


def use_portable_rotary(network: GLMNetwork) -> None:
    """Replaces the one operator that a CPU does not have: its BatchMatMul repeats no matrix over a batch."""
    dtype = DTYPES[network.config.compute_dtype]
    for layer in network.transformer.encoder.layers:
        attention = layer.self_attention
        attention.rotary = ApplyRotary(network.config.kv_channels, dtype)
        attention.rotary_key = ApplyRotary(network.config.kv_channels, dtype)
