"""KV cache and the compiled cells that use it: prompts, steps, copies, prefixes, over slots or over pages."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.model.layers import DTYPES
from glm_ms.ops.portable import HIDDEN_SCORE


class KVCache:
    """Keys and values of every layer for `slots` sequences of at most `capacity` tokens.

    Each layer has two tables [slots * groups * capacity, D]: row (slot * groups + group) * capacity + index. Flat
    rows let one ScatterUpdate on the first axis write any tokens of any slot, and [slots, groups, capacity, D] is a
    view of the table, so that a step reads it without a copy.
    """

    def __init__(self, config: GLMConfig, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.groups, self.dim = config.num_kv_heads, config.kv_channels
        shape, dtype = self.table_shape(), DTYPES[config.compute_dtype]

        def table(name: str) -> Parameter:
            return Parameter(Tensor(np.zeros(shape, np.float32), dtype), name=name, requires_grad=False)

        self.keys = [table(f"key_cache.{i}") for i in range(config.num_layers)]
        self.values = [table(f"value_cache.{i}") for i in range(config.num_layers)]

    def table_shape(self) -> tuple[int, ...]:
        """Shape of every table; its first axis has as many entries for each slot."""
        return self.slots * self.groups * self.capacity, self.dim

    @property
    def tables(self) -> list[Parameter]:
        """Keys of all layers, then values."""
        return self.keys + self.values

    def zeros(self) -> list[Tensor]:
        """New contents of all tables. In float32 they take no memory before they are written."""
        dtype = self.keys[0].dtype
        zeros = [np.zeros(self.keys[0].shape, np.float32) for _ in self.tables]
        return [Tensor.from_numpy(one) if dtype == ms.float32 else Tensor(one, dtype) for one in zeros]

    def rows(self, slots: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Table rows int32 [B * S * G], in the order of keys [B, S, G], for slots [B] and indices in them [B, S]."""
        groups = np.arange(self.groups)
        rows = (slots[:, None, None] * self.groups + groups) * self.capacity + indices[:, :, None]
        return rows.reshape(-1).astype(np.int32)

    def page_rows(self, pages: np.ndarray, places: np.ndarray) -> np.ndarray:
        """As `rows`, for slots that are pages, and places in them, [B, S] each."""
        rows = (pages[:, :, None] * self.groups + np.arange(self.groups)) * self.capacity + places[:, :, None]
        return rows.reshape(-1).astype(np.int32)

    def page_blocks(self, tables: np.ndarray) -> np.ndarray:
        """Blocks int32 [B * G * P], in the order of keys [B, G, P], for the P pages of each sequence, [B, P]."""
        blocks = tables[:, None, :] * self.groups + np.arange(self.groups)[None, :, None]
        return blocks.reshape(-1).astype(np.int32)

    def page_content(self, parts: np.ndarray) -> np.ndarray:
        """Keys or values of a page, [..., capacity, G, D], in the order of a table: [..., entries of a page, ...]."""
        return parts.swapaxes(-3, -2).reshape(*parts.shape[:-3], -1, self.dim)


class BlockCache(KVCache):
    """Pages as the kernels of `glm_ms.ops.ascend` read them: tables [pages, capacity, G, D].

    A new key belongs to the row page * capacity + place, int32 [B * S]. Blocks are pages, int32 [B, P]. These kernels
    see every key from the first on, so a P-Tuning prefix must fill its pages.
    """

    def table_shape(self) -> tuple[int, ...]:
        return self.slots, self.capacity, self.groups, self.dim

    def page_rows(self, pages: np.ndarray, places: np.ndarray) -> np.ndarray:
        return (pages * self.capacity + places).reshape(-1).astype(np.int32)

    def page_blocks(self, tables: np.ndarray) -> np.ndarray:
        return tables.astype(np.int32)

    def page_content(self, parts: np.ndarray) -> np.ndarray:
        return parts[..., None, :, :, :]


class CachedLayers(nn.Cell):
    """The layers of a network over a `KVCache`, which they write in place.

    Args:
        cache: shared with other cells.
        total: T, the tokens of a row.
        block: table rows of a block, see `Cache` in `glm_ms.model.glm`.
    """

    def __init__(self, network: GLMNetwork, cache: KVCache, total: int, block: int) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = network.transformer
        self.keys, self.values = ms.ParameterTuple(cache.keys), ms.ParameterTuple(cache.values)
        self.key_indices = Tensor(np.arange(total, dtype=np.int32).reshape(1, 1, 1, -1))
        self.hidden_size, self.block = network.config.hidden_size, block
        self.later, self.hide = ops.Greater(), ops.Mul()
        self.gather, self.reshape = ops.Gather(), ops.Reshape()

    def comes_later(self, indices: Tensor) -> Tensor:
        """Which of all keys come after tokens with the indices int32 [B, S]: bool [B, 1, S, T]."""
        return self.later(self.key_indices, ops.expand_dims(ops.expand_dims(indices, 1), 3))

    def run_layers(
        self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor, rows: Tensor, blocks: Tensor | None,
        adapters: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Input of the output layer, [B * S, H], where hidden bool [B, 1, S, T] says which keys a token does not see;
        stores new keys and values. For rows, blocks, adapters and lengths see `Cache` in `glm_ms.model.glm`."""
        net = self.transformer
        cos, sin = net.rotation(position_ids)
        bias = self.hide(ops.cast(hidden, ms.float32), HIDDEN_SCORE)
        x = net.embedding(input_ids)
        for i in range(len(self.keys)):
            cache = (self.keys[i], self.values[i], rows, blocks, self.block, adapters, lengths)
            x = net.encoder.layers[i](x, cos, sin, bias, None, None, cache)
        return self.reshape(net.encoder.finish(x), (-1, self.hidden_size))

    def output(self, x: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [N, H], number of the adapter of each, int32 [N] -> logits float32 [N, V]."""
        return ops.cast(self.transformer.output_layer(x, adapters), ms.float32)


class CachedGLM(CachedLayers):
    """The network over slots: row i of a batch is slot i."""

    def __init__(self, network: GLMNetwork, cache: KVCache) -> None:
        super().__init__(network, cache, cache.capacity, cache.groups * cache.capacity)

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, indices: Tensor, rows: Tensor, last: Tensor | None = None
    ) -> Tensor:
        """Runs new tokens, stores their keys and values, returns the logits of the last of each row, float32 [B, V].

        A token sees the keys of its slot up to its own index. A prompt that is padded on the right therefore never
        sees its padding, and later tokens overwrite it.

        Args:
            input_ids, position_ids, indices: int32 [B, S]; `indices` are those within a slot.
            rows: int32 [B * S * G], `KVCache.rows` of them.
            last: int32 [B], place of the last token of each row in [B * S]. None: S is 1.
        """
        x = self.run_layers(input_ids, position_ids, self.comes_later(indices), rows, None)
        if last is not None:
            x = self.gather(x, last, 0)
        return self.output(x)


class PagedGLM(CachedLayers):
    """The network over the pages of a `KVCache`: its slots are pages here, and a sequence has any of them.

    Args:
        cache: of pages, `capacity` tokens each.
        total: T, tokens of a sequence; a multiple of `capacity`.
    """

    def __init__(self, network: GLMNetwork, cache: KVCache, total: int) -> None:
        super().__init__(network, cache, total, cache.capacity)
        self.earlier, self.either = ops.Less(), ops.LogicalOr()

    def construct(
        self, input_ids: Tensor, position_ids: Tensor, indices: Tensor, first: Tensor, rows: Tensor, blocks: Tensor,
        adapters: Tensor | None = None, last: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Runs new tokens and stores their keys and values.

        A token sees the keys of its sequence from index `first` up to its own.

        Args:
            input_ids, position_ids, indices: int32 [B, S]; `indices` are those within a sequence.
            first: int32 [B].
            rows, blocks: int32, see `page_rows` and `page_blocks` of the cache.
            adapters: number of the adapter of each sequence, int32 [B]; None: there are no adapters.
            last: int32 [1], a place in [B * S]; None: S is 1.

        Returns:
            The logits of every token, float32 [B, V]; with `last` those of this token, [1, V], and the input of the
            output layer for all tokens, [B * S, H].
        """
        before = self.earlier(self.key_indices, self.reshape(first, (-1, 1, 1, 1)))
        hidden = self.either(self.comes_later(indices), before)
        lengths = self.reshape(indices, (-1,)) + 1
        x = self.run_layers(input_ids, position_ids, hidden, rows, blocks, adapters, lengths)
        if last is None:
            return self.output(x, adapters)
        return self.output(self.gather(x, last, 0), adapters), x


class OutputLayer(nn.Cell):
    """The logits of one of the tokens that `PagedGLM` has returned the input of the output layer for."""

    def __init__(self, network: GLMNetwork) -> None:
        super().__init__(auto_prefix=False)
        self.transformer = network.transformer
        self.gather = ops.Gather()

    def construct(self, x: Tensor, place: Tensor, adapters: Tensor | None = None) -> Tensor:
        """x [N, H], place int32 [1], number of the adapter int32 [1] -> float32 [1, V]."""
        return ops.cast(self.transformer.output_layer(self.gather(x, place, 0), adapters), ms.float32)


class CopyPages(nn.Cell):
    """Copies pages of a cache."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.tables, self.slots = ms.ParameterTuple(cache.tables), cache.slots
        shape = cache.table_shape()
        self.rows, self.entry = Tensor(np.arange(shape[0] // cache.slots, dtype=np.int32)), shape[1:]
        self.gather, self.write, self.reshape = ops.Gather(), ops.ScatterUpdate(), ops.Reshape()

    def construct(self, sources: Tensor, targets: Tensor) -> Tensor:
        """sources, targets int32 [N]: page targets[i] becomes what page sources[i] was; targets that occur twice get
        any of theirs. Returns `targets`."""
        count = self.rows.shape[0]
        rows = self.reshape(ops.expand_dims(targets, 1) * count + self.rows, (-1,))
        for table in self.tables:
            pages = self.gather(self.reshape(table, (self.slots, -1)), sources, 0)
            self.write(table, rows, self.reshape(pages, (-1,) + self.entry))  # noqa: RUF005, the graph compiler wants +
        return targets


class WritePage(nn.Cell):
    """Overwrites one page of a cache."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.tables = ms.ParameterTuple(cache.tables)
        self.rows = Tensor(np.arange(cache.table_shape()[0] // cache.slots, dtype=np.int32))
        self.write = ops.ScatterUpdate()

    def construct(self, page: Tensor, content: Tensor) -> Tensor:
        """page int32 [1], content of the page in every table, see `page_content`, [2 * layers, ...]. Returns `page`."""
        rows = page * self.rows.shape[0] + self.rows
        for i in range(len(self.tables)):
            self.write(self.tables[i], rows, content[i])
        return page


class PositionedGLM(nn.Cell):
    """A `CachedGLM` that computes indices and rows itself: for exported graphs, which run without this package.

    Row i of a batch is slot i. The cache begins with `prefix` tokens, which have no positions.
    """

    def __init__(self, network: GLMNetwork, cache: KVCache, prefix: int) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.prefix = CachedGLM(network, cache), prefix
        slots = np.arange(cache.slots)
        self.first_rows = Tensor(cache.rows(slots, np.full((cache.slots, 1), prefix)).reshape(cache.slots, 1, -1))
        self.slots = Tensor(slots.astype(np.int32))
        self.reshape = ops.Reshape()

    def construct(self, input_ids: Tensor, position_ids: Tensor, last: Tensor | None = None) -> Tensor:
        """input_ids, position_ids int32 [B, S]; last int32 [B], place of the last token in its row, None if S is 1
        -> logits after the last tokens, float32 [B, V].

        Positions count from 0, through padding too, which is on the right.
        """
        rows = self.reshape(self.first_rows + ops.expand_dims(position_ids, 2), (-1,))
        if last is not None:
            last = last + self.slots * ops.shape(input_ids)[1]
        return self.network(input_ids, position_ids, position_ids + self.prefix, rows, last)


class WritePrefix(nn.Cell):
    """Writes the keys and values of a `GLMTransformer.prefix_encoder` to a cache, `copies` times."""

    def __init__(self, prefix_encoder: nn.Cell, copies: int, cache: KVCache) -> None:
        super().__init__(auto_prefix=False)
        self.prefix_encoder, self.copies, self.dim = prefix_encoder, copies, cache.dim
        self.keys, self.values = ms.ParameterTuple(cache.keys), ms.ParameterTuple(cache.values)
        self.write, self.reshape = ops.ScatterUpdate(), ops.Reshape()

    def construct(self, rows: Tensor) -> Tensor:
        """rows int32 [copies * P * G], the table rows of each copy in the order of keys [P, G]. Returns `rows`."""
        prefix = self.prefix_encoder(self.copies, None)
        for i in range(len(self.keys)):
            self.write(self.keys[i], rows, self.reshape(prefix[i][0], (-1, self.dim)))
            self.write(self.values[i], rows, self.reshape(prefix[i][1], (-1, self.dim)))
        return rows
