"""KV cache and the two compiled cells that use it: prefill (any length) and step (one token)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.model.layers import DTYPES


class KVCache:
    """Keys and values of every layer for `batch` sequences of at most `capacity` tokens.

    Each layer holds two parameters [batch * groups * capacity, D]: row (b * groups + g) * capacity + slot. Flat rows
    let one ScatterUpdate on the first axis place any tokens of any sequence, and [batch, groups, capacity, D] is a
    view of it, so nothing is copied or transposed when it is read.
    """

    def __init__(self, config: GLMConfig, batch: int, capacity: int) -> None:
        self.batch, self.capacity, self.groups = batch, capacity, config.num_kv_heads
        shape = (batch * self.groups * capacity, config.kv_channels)
        zeros = np.zeros(shape, np.float32)
        dtype = DTYPES[config.compute_dtype]
        self.keys = [
            Parameter(Tensor(zeros, dtype), name=f"key_cache.{i}", requires_grad=False)
            for i in range(config.num_layers)
        ]
        self.values = [
            Parameter(Tensor(zeros, dtype), name=f"value_cache.{i}", requires_grad=False)
            for i in range(config.num_layers)
        ]
        self._first_row = np.arange(batch * self.groups).reshape(batch, 1, self.groups) * capacity

    def rows(self, start: int, length: int) -> np.ndarray:
        """Rows of slots start .. start + length - 1, in the order of keys [B, S, G]: int32 [B * S * G]."""
        slots = np.arange(start, start + length).reshape(1, length, 1)
        return (self._first_row + slots).reshape(-1).astype(np.int32)


class CachedGLM(nn.Cell):
    """The network over a `KVCache`; returns the logits of the last position.

    The same class serves prefill (dynamic length) and step (length 1): two instances share network and cache, each
    compiled once.

    Args:
        network: weights.
        cache: written in place.
    """

    def __init__(self, network: GLMNetwork, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = network.transformer
        self.keys = ms.ParameterTuple(cache.keys)
        self.values = ms.ParameterTuple(cache.values)
        self.key_slots = Tensor(np.arange(cache.capacity, dtype=np.int32))

    def construct(
        self,
        input_ids: Tensor,
        query_mask: Tensor,
        key_mask: Tensor,
        position_ids: Tensor,
        slots: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Runs new tokens and stores their keys and values.

        Args:
            input_ids: int32 [B, S], the new tokens.
            query_mask: int32 [B, S], 0 where a new token is padding.
            key_mask: int32 [B, capacity], 0 where a slot is padding or not yet written.
            position_ids: int32 [B, S].
            slots: int32 [S], the slots the new tokens take.
            rows: int32 [B * S * G], `KVCache.rows` of those slots.

        Returns:
            float32 [B, V].
        """
        net = self.transformer
        cos, sin = net.rotation(position_ids)
        bias = net.attention_bias(slots, self.key_slots, query_mask, key_mask)
        x = net.embedding(input_ids)
        for i in range(len(self.keys)):
            x = net.encoder.layers[i].cached(x, cos, sin, bias, rows, (self.keys[i], self.values[i]))
        hidden = net.encoder.finish(x[:, -1:])
        return ops.cast(net.output_layer(hidden)[:, 0], ms.float32)


class WritePrefix(nn.Cell):
    """Writes the keys and values of a prefix encoder into the first slots of every sequence.

    Args:
        network: has a prefix encoder.
        cache: written in place.
    """

    def __init__(self, network: GLMNetwork, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.prefix_encoder = network.transformer.prefix_encoder
        self.batch, self.dim = cache.batch, network.config.kv_channels
        self.keys = ms.ParameterTuple(cache.keys)
        self.values = ms.ParameterTuple(cache.values)
        self.write = ops.ScatterUpdate()
        self.reshape = ops.Reshape()

    def construct(self, rows: Tensor) -> Tensor:
        """rows int32 [B * P * G], `KVCache.rows` of the first P slots. Returns `rows`."""
        prefix = self.prefix_encoder(self.batch, None)
        for i in range(len(self.keys)):
            self.write(self.keys[i], rows, self.reshape(prefix[i][0], (-1, self.dim)))
            self.write(self.values[i], rows, self.reshape(prefix[i][1], (-1, self.dim)))
        return rows


class ReorderCache(nn.Cell):
    """Gives every sequence of the cache the contents of another one (beam search)."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.batch = cache.batch
        self.tables = ms.ParameterTuple(cache.keys + cache.values)
        self.gather = ops.Gather()
        self.assign = ops.Assign()
        self.reshape = ops.Reshape()

    def construct(self, order: Tensor) -> Tensor:
        """order int32 [B]: sequence i becomes the former sequence order[i]. Returns `order`."""
        for table in self.tables:
            moved = self.gather(self.reshape(table, (self.batch, -1)), order, 0)
            self.assign(table, self.reshape(moved, ops.shape(table)))
        return order
