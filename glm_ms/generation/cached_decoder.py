"""The network as a `Decoder`: prompts in, logits of the last position out, keys and values remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms.model.cache import CachedGLM, KVCache, ReorderCache, WritePrefix
from glm_ms.model.glm import GLMNetwork

_SMALLEST_CAPACITY = 64
# Idle decoders kept per network. A run alternates between few sizes; each holds a cache and its graphs.
_DECODERS_KEPT = 2


def cache_capacity(length: int) -> int:
    """Slots of the cache that serves sequences of up to `length`: the next power of two, since each is compiled for."""
    capacity = _SMALLEST_CAPACITY
    while capacity < length:
        capacity *= 2
    return capacity


_GRAPHS = threading.RLock()

_IDS = Tensor(shape=[None, None], dtype=ms.int32)
_VECTOR = Tensor(shape=[None], dtype=ms.int32)


@contextmanager
def graph_mode() -> Iterator[None]:
    """Runs cells as compiled graphs inside the block, whatever mode the caller's program is in.

    One thread at a time: the mode belongs to the process, and MindSpore does not run a cell twice at once.
    """
    with _GRAPHS:
        mode = ms.get_context("mode")
        if mode == ms.GRAPH_MODE:
            yield
            return
        ms.set_context(mode=ms.GRAPH_MODE)
        try:
            yield
        finally:
            ms.set_context(mode=mode)


class CachedDecoder:
    """A KV cache of fixed size and the cells compiled for it.

    Args:
        network: weights; shared, not copied.
        batch: number of sequences B.
        capacity: most slots (prompt, padding and new tokens) of a sequence.
    """

    def __init__(self, network: GLMNetwork, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        encoder = network.transformer.prefix_encoder
        self._prefix = 0 if encoder is None else encoder.length
        capacity += self._prefix
        self.cache = KVCache(network.config, batch, capacity)
        if self._prefix:
            self._write_prefix = WritePrefix(network, self.cache)
            self._prefix_rows = Tensor(self.cache.rows(0, self._prefix))
        self._prefill = CachedGLM(network, self.cache)
        self._prefill.set_inputs(_IDS, _IDS, _IDS, _IDS, _VECTOR, _VECTOR)
        self._step = CachedGLM(network, self.cache)
        self._reorder = ReorderCache(self.cache)
        self._key_mask = np.zeros((batch, capacity), np.int32)
        self._used = 0

    def prefill(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray
    ) -> np.ndarray:
        """Starts anew with left padded prompts.

        Args:
            input_ids, attention_mask, position_ids: int32 [B, S].

        Returns:
            float32 [B, V], logits of the last position.
        """
        self._used = self._prefix
        self._key_mask[:] = 0
        if self._prefix:
            with graph_mode():
                self._write_prefix(self._prefix_rows)
            self._key_mask[:, : self._prefix] = 1
        return self._run(self._prefill, input_ids, attention_mask, position_ids)

    def step(self, token_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Appends one token to every sequence.

        Args:
            token_ids, position_ids: int32 [B].

        Returns:
            float32 [B, V].
        """
        ids = token_ids.reshape(-1, 1)
        return self._run(self._step, ids, np.ones_like(ids), position_ids.reshape(-1, 1))

    def reorder(self, rows: np.ndarray) -> None:
        """Sequence i becomes the former sequence rows[i], int32 [B]."""
        self._key_mask = self._key_mask[rows]
        with graph_mode():
            self._reorder(Tensor(rows, ms.int32))

    def _run(self, cell: CachedGLM, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        start, length = self._used, ids.shape[1]
        self._key_mask[:, start : start + length] = mask
        self._used += length
        arguments = (
            ids,
            np.ones_like(mask) if self._prefix else mask,  # see GLMTransformer.prefixed_bias
            self._key_mask,
            positions,
            np.arange(start, start + length),
            self.cache.rows(start, length),
        )
        with graph_mode():
            return cell(*(Tensor(np.ascontiguousarray(x, np.int32)) for x in arguments)).asnumpy()


class DecoderPool:
    """Lends compiled decoders, so that calls of similar size do not compile again.

    A decoder on loan is nobody else's: streams that run at the same time get caches of their own.

    Args:
        network: weights of all decoders.
    """

    def __init__(self, network: GLMNetwork) -> None:
        self._network = network
        self._idle: OrderedDict[CachedDecoder, None] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, batch: int, length: int) -> Iterator[CachedDecoder]:
        """A decoder for `batch` sequences of up to `length` slots; the capacity is the next power of two."""
        capacity = cache_capacity(length)
        with self._lock:
            fitting = (one for one in self._idle if (one.batch, one.capacity) == (batch, capacity))
            decoder = next(fitting, None)
            if decoder is not None:
                del self._idle[decoder]
        if decoder is None:
            decoder = CachedDecoder(self._network, batch, capacity)
        try:
            yield decoder
        finally:
            with self._lock:
                self._idle[decoder] = None
                while len(self._idle) > _DECODERS_KEPT:
                    self._idle.popitem(last=False)
