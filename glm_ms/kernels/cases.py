"""Every operator of `glm_ms.ops.registry` with inputs: at given sizes, and at those of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from glm_ms.generation.page_graphs import CHUNK
from glm_ms.generation.pages import PAGE
from glm_ms.model.cache import BlockCache, KVCache
from glm_ms.model.config import GLMConfig
from glm_ms.ops import registry
from glm_ms.ops.packing import GROUPS, dequantise, pack_int4, pack_int8
from glm_ms.ops.portable import (
    HIDDEN_SCORE,
    ApplyRotary,
    CachedAttention,
    GroupedAttention,
    RMSNormalize,
    rotary_tables,
)
from glm_ms.ops.quantized import Int4Product, Int8Product, QuantizedProduct

_EPS_OF_NORM = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Rows, tokens of a row, width, query heads, key/value groups, channels of a head."""

    batch: int
    length: int
    hidden: int
    heads: int
    groups: int
    dim: int


SMALL = Sizes(batch=2, length=24, hidden=64, heads=4, groups=2, dim=16)
# Of ChatGLM2-6B and ChatGLM3-6B.
REAL = Sizes(batch=1, length=1024, hidden=4096, heads=32, groups=2, dim=128)


@dataclass(frozen=True)
class KernelCase:
    """One operator with inputs.

    Args:
        name: of the check.
        operator: name in `glm_ms.ops.registry.OPERATORS`.
        shape: of its main input.
        portable: builds the portable cell, given the type.
        inputs: float32 arrays.
        kept: positions of the inputs that do not take the type under test.
        differentiable: positions of the inputs whose gradients are compared.
        exact: the result by NumPy in float64.
        result_shape: of the result.
        roundings: allowed difference, in units of the last place of the largest result. In float16 the portable
            operators themselves differ from the exact result by a tenth to a fifth of it.
        around: puts a portable or fused cell of a type between more that it needs.
    """

    name: str
    operator: str
    shape: str
    portable: Callable[[ms.Type], nn.Cell]
    inputs: tuple[np.ndarray, ...]
    kept: tuple[int, ...]
    differentiable: tuple[int, ...]
    exact: Callable[..., np.ndarray]
    result_shape: tuple[int, ...]
    roundings: int
    around: Callable[[Any, ms.Type], nn.Cell] = lambda cell, dtype: cell

    def reference(self, dtype: str) -> nn.Cell:
        """The portable cell."""
        kind = getattr(ms, dtype)
        return self.around(self.portable(kind), kind)

    def tensors(self, dtype: str) -> list[Tensor]:
        """The inputs in the type under test."""
        return [
            Tensor(array) if i in self.kept else Tensor(array, getattr(ms, dtype))
            for i, array in enumerate(self.inputs)
        ]

    def fused(self, dtype: str) -> nn.Cell:
        """The kernel of this device; ValueError if it cannot take these sizes or this type."""
        kernel, kind = registry.operators_of(registry.device())[self.operator], getattr(ms, dtype)
        cell = self.portable(kind)
        why = kernel.why_not(cell, kind)
        if why is not None:
            raise ValueError(why)
        return self.around(kernel.replacing(cell, kind), kind)


def kernel_cases(sizes: Sizes) -> list[KernelCase]:
    """Every operator at the given sizes, with seeded normal inputs; attention also for a single new token, and over the
    pages of a cache; products as of queries, keys and values."""
    rng = np.random.default_rng(0)
    attention = (attention_case(sizes, rng, length) for length in (sizes.length, 1))
    cached = (cached_case(sizes, rng, length) for length in (min(sizes.length, CHUNK), 1))
    outputs, rows = (sizes.heads + 2 * sizes.groups) * sizes.dim, sizes.batch * sizes.length
    products = (
        product_case(Product(bits, sizes.hidden, outputs, group), rows, rng) for bits, group in ((8, 0), (4, GROUPS[0]))
    )
    return [norm_case(sizes, rng), rotary_case(sizes, rng), *attention, *cached, *products]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Seeded normal numbers, float32."""
    return rng.standard_normal(shape, np.float32)


def _by(*sizes: int) -> str:
    return "x".join(map(str, sizes))


class Product(NamedTuple):
    """Sizes of a `glm_ms.ops.quantized.QuantizedProduct`."""

    bits: int
    inputs: int
    outputs: int
    group: int


def product_case(product: Product, rows: int, rng: np.random.Generator) -> KernelCase:
    """Integers over their whole range, scales that are those of real weights in size, `rows` of x."""
    shape, group = (product.outputs, product.inputs), product.group or product.inputs
    largest_weights = rng.uniform(0.05, 0.15, (product.outputs, -(-product.inputs // group)))
    if product.bits == 8:
        integers = rng.integers(-127, 127, shape, np.int8, endpoint=True)
        packed = pack_int8(integers, largest_weights[:, 0].astype(np.float32) / 127)
    else:
        packed = pack_int4(rng.integers(-8, 7, shape, np.int8, endpoint=True), largest_weights / 8, product.group)

    def portable(dtype: ms.Type) -> nn.Cell:
        cell: QuantizedProduct = (
            Int8Product(product.inputs, product.outputs, dtype)
            if product.bits == 8
            else Int4Product(product.inputs, product.outputs, product.group, dtype)
        )
        cell.weight.set_data(Tensor(packed.data))
        cell.scale.set_data(Tensor(packed.scale))
        return cell

    name = f"int{product.bits} product"
    return KernelCase(
        name, name, f"{_by(rows, product.inputs)} to {product.outputs}", portable,
        (normal(rng, rows, product.inputs),), (), (), lambda x: x @ dequantise(packed).T, (rows, product.outputs), 4
    )  # fmt: skip


def norm_case(sizes: Sizes, rng: np.random.Generator, weight_float32: bool = False) -> KernelCase:
    """`weight_float32`: the weight does not take the type under test."""

    def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + _EPS_OF_NORM) * weight

    shape = (sizes.batch, sizes.length, sizes.hidden)
    inputs = (normal(rng, *shape), 1 + 0.2 * normal(rng, sizes.hidden))
    return KernelCase(
        "RMS norm", "RMS norm", _by(*shape), lambda _: RMSNormalize(_EPS_OF_NORM), inputs,
        (1,) if weight_float32 else (), (0, 1), exact, shape, 2
    )  # fmt: skip


def rotary_case(sizes: Sizes, rng: np.random.Generator) -> KernelCase:
    """All query and key heads, as the network turns them."""

    def exact(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
        return x * cos + turned * sin

    shape = (sizes.batch, sizes.length, sizes.heads + sizes.groups, sizes.dim)
    tables = (np.repeat(table[None, :, None], sizes.batch, axis=0) for table in rotary_tables(sizes.length, sizes.dim))
    return KernelCase(
        "rotary embedding", "rotary embedding", _by(*shape), lambda dtype: ApplyRotary(sizes.dim, dtype),
        (normal(rng, *shape), *tables), (), (0,), exact, shape, 4
    )  # fmt: skip


def attention_case(sizes: Sizes, rng: np.random.Generator, length: int) -> KernelCase:
    """The last `length` tokens look at all of them; the first keys of the last row are padding."""

    def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return _attended(sizes, query, key.swapaxes(1, 2), value.swapaxes(1, 2), bias)

    keys = (sizes.batch, sizes.length, sizes.groups, sizes.dim)
    shape = (sizes.batch, length, sizes.heads, sizes.dim)
    slots = np.arange(sizes.length)
    hidden = np.repeat((slots > slots[sizes.length - length :, None])[None, None], sizes.batch, axis=0)
    padding = sizes.length // 4
    hidden[-1, :, max(0, padding - (sizes.length - length)) :, :padding] = True
    # Queries that are padding see everything, as in the network.
    hidden[-1, :, : max(0, padding - (sizes.length - length))] = False
    bias = np.where(hidden, np.float32(HIDDEN_SCORE), np.float32(0))
    name = "attention" if length > 1 else "attention, one token"
    return KernelCase(
        name, "attention", f"{_by(*shape)}, {sizes.groups}x{sizes.length}",
        lambda _: GroupedAttention(sizes.heads, sizes.groups, sizes.dim),
        (normal(rng, *shape), normal(rng, *keys), normal(rng, *keys), bias), (3,),
        (0, 1, 2) if length > 1 else (), exact, (*shape[:2], sizes.heads * sizes.dim), 4
    )  # fmt: skip


class OverPages(nn.Cell):
    """A cell for attention over a cache, whose pages, in any order, are filled with the first keys and values of rows.

    Args:
        cell: portable or fused; it gets the tables that it needs.
        dtype: type of the tables.
        old: keys and values, float32 [2, B, T, G, D]; T fills whole pages. Those of new tokens are overwritten.
        length: S, new tokens of each row, the last ones.
    """

    def __init__(self, cell: Any, dtype: ms.Type, old: np.ndarray, length: int) -> None:
        super().__init__()
        _, batch, total, groups, dim = old.shape
        config = GLMConfig(
            num_layers=1, num_attention_heads=groups, multi_query_group_num=groups, kv_channels=dim,
            compute_dtype=str(dtype).lower()
        )  # fmt: skip
        cache = (BlockCache if cell.whole_pages else KVCache)(config, batch * total // PAGE, PAGE)
        tables = np.arange(cache.slots)[::-1].reshape(batch, -1)
        for table, values in zip(cache.tables, old.reshape(2, -1, PAGE, groups, dim)[:, ::-1]):
            table.set_data(Tensor(cache.page_content(values).reshape(cache.table_shape()), dtype))
        indices = np.tile(np.arange(total - length, total), (batch, 1))
        rows = cache.page_rows(np.take_along_axis(tables, indices // PAGE, 1), indices % PAGE)
        self.cell, self.block, (self.keys, self.values) = cell, PAGE, cache.tables
        self.rows, self.blocks = Tensor(rows), Tensor(cache.page_blocks(tables))
        self.lengths = Tensor(indices.reshape(-1) + 1, ms.int32)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """query [B, S, N, D]; key, value [B, S, G, D]; bias float32 [B, 1, S, T] -> [B, S, N * D]."""
        cache = (self.keys, self.values, self.rows, self.blocks, self.block, None, self.lengths)
        return self.cell(query, key, value, bias, cache)


def cached_case(sizes: Sizes, rng: np.random.Generator, length: int) -> KernelCase:
    """The last `length` tokens of each row look at its pages."""
    total = -(-sizes.length // PAGE) * PAGE
    old = normal(rng, 2, sizes.batch, total, sizes.groups, sizes.dim)
    slots = np.arange(total)
    hidden = np.repeat((slots > slots[total - length :, None])[None, None], sizes.batch, axis=0)
    bias = np.where(hidden, np.float32(HIDDEN_SCORE), np.float32(0))

    def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
        keys, values = (
            np.concatenate((part[:, : total - length].astype(np.float64), new), 1).swapaxes(1, 2)
            for part, new in zip(old, (key, value))
        )
        return _attended(sizes, query, keys, values, bias)

    shape, new = (sizes.batch, length, sizes.heads, sizes.dim), (sizes.batch, length, sizes.groups, sizes.dim)
    return KernelCase(
        "attention over pages" if length > 1 else "attention over pages, one token", "cached attention",
        f"{_by(*shape)}, {sizes.groups}x{total}",
        lambda _: CachedAttention(sizes.heads, sizes.groups, sizes.dim),
        (normal(rng, *shape), normal(rng, *new), normal(rng, *new), bias), (3,), (), exact,
        (*shape[:2], sizes.heads * sizes.dim), 4,
        partial(OverPages, old=old, length=length)
    )  # fmt: skip


def _attended(sizes: Sizes, query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Attention by NumPy: query [B, S, N, D]; key, value [B, G, T, D]; bias [B, 1, S, T] -> [B, S, N * D]."""
    per_group = sizes.heads // sizes.groups
    key, value = np.repeat(key, per_group, axis=1), np.repeat(value, per_group, axis=1)
    scores = np.einsum("bsnd,bntd->bnst", query, key) / np.sqrt(sizes.dim) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bnst,bntd->bsnd", weights / weights.sum(-1, keepdims=True), value)
    return mixed.reshape(*query.shape[:2], -1)
