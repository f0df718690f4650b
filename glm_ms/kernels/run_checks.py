"""The comparisons of kernels that a run needs: its operators, sizes and types."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
from mindspore import nn

from glm_ms.ascend_hints import essence
from glm_ms.generation.page_graphs import CHUNK
from glm_ms.kernels.cases import (
    KernelCase,
    Product,
    Sizes,
    attention_case,
    cached_case,
    norm_case,
    product_case,
    rotary_case,
)
from glm_ms.kernels.compare import DEVICE_ERRORS, against_portable
from glm_ms.kernels.remembered import Outcome
from glm_ms.model.config import GLMConfig
from glm_ms.ops.quantized import QuantizedProduct

# Sizes above these are not compared: rows and outputs are computed one by one, longer sequences in the same blocks, and
# the scores of the portable attention take batch * heads * length^2 numbers.
_MOST_ROWS, _MOST_TOKENS, _MOST_SLOTS, _MOST_OUTPUTS = 2, 2048, 16, 16384
# Longest text of an error that is remembered.
_LONGEST_ERROR = 200


@dataclass(frozen=True)
class Use:
    """What a run computes with the operators of its network; 0 rows or slots: nothing of this kind.

    Args:
        rows, length: of a batch of whole sequences, for training or losses.
        prefix: P-Tuning keys before those tokens.
        trains: gradients of these rows are needed.
        slots, context: sequences at a time of a generation, and tokens of one.
    """

    rows: int = 0
    length: int = 0
    prefix: int = 0
    trains: bool = False
    slots: int = 0
    context: int = 0


@dataclass(frozen=True)
class RunCheck:
    """One comparison; `build` makes its inputs, which may be large, when it runs.

    Args:
        name: with sizes and types, unique.
        operator: name in `glm_ms.ops.registry.OPERATORS`.
        gradients: of the kernel are compared too.
    """

    name: str
    operator: str
    dtype: str
    gradients: bool
    build: Callable[[], KernelCase]

    def run(self) -> Outcome:
        """Compares results and, if needed, gradients."""
        texts = []
        for gradients in (False, True) if self.gradients else (False,):
            what = "gradient" if gradients else "result"
            try:
                difference, allowed, *_ = against_portable(self.build(), self.dtype, gradients, repeats=0)
            except DEVICE_ERRORS as error:
                text = " ".join(essence(f"{type(error).__name__}: {error}").split())
                return Outcome(False, f"{what}: {text[:_LONGEST_ERROR]}")
            texts.append(f"{what} differs by {difference:.1e}, allowed {allowed:.1e}")
            if not difference <= allowed:  # a NaN does not agree
                return Outcome(False, texts[-1])
        return Outcome(True, "; ".join(texts))


def products_of(network: nn.Cell) -> set[Product]:
    """Sizes of all quantized products of a network."""
    cells = (cell for _, cell in network.cells_and_names() if isinstance(cell, QuantizedProduct))
    return {Product(cell.bits, cell.in_features, cell.out_features, cell.group) for cell in cells}


def run_checks(config: GLMConfig, use: Use, products: Collection[Product] = ()) -> list[RunCheck]:
    """The comparisons for all operators that a run uses; `products` are the quantized ones of its network."""
    return [*_whole_sequences(config, use), *_generation(config, use), *_products(config, use, products)]


def _whole_sequences(config: GLMConfig, use: Use) -> Iterator[RunCheck]:
    if not use.rows:
        return
    length = min(use.length, _MOST_TOKENS)
    sizes = _sizes(config, min(use.rows, _MOST_ROWS), length)
    with_prefix = replace(sizes, length=use.prefix + length)
    yield _check(config, "RMS norm", "RMS norm", sizes, length, use.trains)
    yield _check(config, "rotary embedding", "rotary embedding", sizes, length, use.trains)
    yield _check(config, "attention", "attention", with_prefix, length, use.trains)


def _generation(config: GLMConfig, use: Use) -> Iterator[RunCheck]:
    """A chunk of a prompt, and a step of all slots."""
    if not use.slots:
        return
    total = max(min(use.context, _MOST_TOKENS), 1)
    chunk = min(CHUNK, total)
    for rows, length in ((1, chunk), (min(use.slots, _MOST_SLOTS), 1)):
        short, whole = _sizes(config, rows, length), _sizes(config, rows, total)
        yield _check(config, "RMS norm", "RMS norm", short, length, False)
        yield _check(config, "rotary embedding", "rotary embedding", short, length, False)
        yield _check(config, "attention over pages", "cached attention", whole, length, False)


def _products(config: GLMConfig, use: Use, products: Collection[Product]) -> Iterator[RunCheck]:
    """Products of a batch, of a chunk of a prompt, and of a step of all slots."""
    rows = {min(use.rows, _MOST_ROWS) * min(use.length, _MOST_TOKENS)}
    if use.slots:
        rows |= {min(CHUNK, use.context), min(use.slots, _MOST_SLOTS)}
    sizes = {product._replace(outputs=min(product.outputs, _MOST_OUTPUTS)) for product in products}
    for product in sorted(sizes):
        for count in sorted(rows - {0}):
            yield _product_check(config.compute_dtype, product, count)


def _product_check(dtype: str, product: Product, rows: int) -> RunCheck:
    group = f", groups of {product.group}" if product.group else ""
    name = f"int{product.bits} product of {rows}x{product.inputs} to {product.outputs}{group}, {dtype}"
    return RunCheck(
        name, f"int{product.bits} product", dtype, False,
        lambda: product_case(product, rows, np.random.default_rng(0))
    )  # fmt: skip


def _sizes(config: GLMConfig, rows: int, length: int) -> Sizes:
    return Sizes(
        batch=rows, length=length, hidden=config.hidden_size, heads=config.num_attention_heads,
        groups=config.num_kv_heads, dim=config.kv_channels
    )  # fmt: skip


def _check(config: GLMConfig, title: str, operator: str, sizes: Sizes, length: int, gradients: bool) -> RunCheck:
    """`length`: the new tokens of each row, of `sizes.length` that attention looks at."""
    float32 = config.param_init_type == "float32"

    def build() -> KernelCase:
        rng = np.random.default_rng(0)
        if operator == "RMS norm":
            return norm_case(sizes, rng, float32)
        if operator == "rotary embedding":
            return rotary_case(sizes, rng)
        return (attention_case if operator == "attention" else cached_case)(sizes, rng, length)

    parts = [f"{title} of {sizes.batch}x{length}"]
    if operator == "RMS norm":
        parts += [f"width {sizes.hidden}", f"weights {config.param_init_type}"]
    else:
        parts += [f"{sizes.heads} heads in {sizes.groups} groups of {sizes.dim}"]
    parts += [f"{sizes.length} keys"] if "attention" in operator else []
    parts += [config.compute_dtype] + (["with gradients"] if gradients else [])
    return RunCheck(", ".join(parts), operator, config.compute_dtype, gradients, build)
