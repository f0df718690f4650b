"""`plan_serving`: memory of a server, fixed from its start: weights, pages of keys and values, tables of adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from glm_ms.convert.names import expected_shapes
from glm_ms.generation.kernel_graphs import ROWS
from glm_ms.generation.page_graphs import CHUNK, pages_of
from glm_ms.generation.pages import PAGE, RESERVED
from glm_ms.model.config import GLMConfig
from glm_ms.ops.cpu.rows import page_bytes
from glm_ms.parallel.config import ParallelConfig
from glm_ms.peft.lora import linear_names
from glm_ms.peft.rows import AdapterBounds
from glm_ms.plan.planned_parameters import ITEM_BYTES, quantized_bytes
from glm_ms.plan.run_plan import size_text
from glm_ms.plan.work import Work, prefill_bytes
from glm_ms.quant import Quantization
from glm_ms.quant.checkpoint import EMBEDDING


@dataclass(frozen=True)
class ServingPlan:
    """Bytes of a server on one card.

    Attributes:
        slots: sequences at a time.
        context: most tokens of one, prompt and answer.
        weights: in their storage type.
        kv_cache: all pages.
        adapters: tables of LoRA matrices.
        activations: while all slots are at work, or a chunk of a prompt is read, whichever takes more.
        page: one page of all layers.
    """

    slots: int
    context: int
    weights: int
    kv_cache: int
    adapters: int
    activations: int
    page: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.adapters + self.activations


def plan_serving(
    config: GLMConfig, slots: int, context: int, bounds: AdapterBounds, fused: bool = False, chunk: int = CHUNK,
    kv_cache: str | None = None, quantization: Quantization | None = None
) -> ServingPlan:  # fmt: skip
    """Plans a server.

    Args:
        config: of the network, with the types of its weights and of its arithmetic.
        slots, context: see `ServingPlan`.
        bounds: adapters that the server has room for.
        fused: attention by a fused kernel, which keeps no scores.
        chunk: tokens of a prompt that run at a time.
        kv_cache: type of keys and values of the C++ kernels of a CPU; None: the portable cells, or an Ascend card.
        quantization: of the weights of linear layers; None: they have the type of the others.
    """
    shapes, item = expected_shapes(config), ITEM_BYTES[config.compute_dtype]
    prefixes = bounds.max_adapters * pages_of(bounds.max_prefix)
    if kv_cache is None:
        page = 2 * config.num_layers * PAGE * config.num_kv_heads * config.kv_channels * item
    else:
        page = config.num_layers * page_bytes(kv_cache, config.num_kv_heads, config.kv_channels)
    total = (pages_of(bounds.max_prefix) + pages_of(context)) * PAGE
    work = Work(config, ParallelConfig(), slots, 1, prefix=total - 1, fused_kernels=fused)
    reading = replace(work, rows=1, length=chunk, prefix=total - chunk)
    return ServingPlan(
        slots,
        context,
        weights=_weight_bytes(shapes, config, quantization),
        kv_cache=(RESERVED + slots * pages_of(context) + prefixes) * page,
        adapters=item * _table_elements(shapes, bounds),
        activations=_kernel_bytes(config, slots) if kv_cache else max(prefill_bytes(work), prefill_bytes(reading)),
        page=page,
    )


def _kernel_bytes(config: GLMConfig, slots: int) -> int:
    """Bytes that the C++ kernels need for a run of all its rows: what MindSpore keeps between them, the largest of
    their own arrays, and the logits."""
    hidden, wide = config.hidden_size, 3 * config.ffn_hidden_size
    attention = hidden + config.qkv_size + config.query_size
    rows = 3 * hidden + config.query_size + max(attention, hidden + wide)
    return ITEM_BYTES["float32"] * (ROWS * rows + slots * config.padded_vocab_size)


def _weight_bytes(shapes: Mapping[str, tuple[int, ...]], config: GLMConfig, quantization: Quantization | None) -> int:
    packed = quantized_bytes(shapes, quantization)
    items = {name: ITEM_BYTES[config.param_init_type] for name in shapes if name not in packed}
    if quantization is not None and quantization.embedding is not None:
        items[EMBEDDING] = ITEM_BYTES[quantization.embedding]
    return sum(packed.values()) + sum(item * math.prod(shapes[name]) for name, item in items.items())


def _table_elements(shapes: Mapping[str, tuple[int, ...]], bounds: AdapterBounds) -> int:
    """Elements of the tables of `glm_ms.peft.rows.RowUpdate` in all layers."""
    if not bounds.max_adapters:
        return 0
    modules = linear_names(shapes) if bounds.modules is None else bounds.modules
    widths = sum(sum(shapes[f"{name}.weight"]) for name in modules)
    return (bounds.max_adapters + 1) * bounds.max_rank * widths


def describe_serving(plan: ServingPlan, memory: int | None) -> Iterator[str]:
    """Lines about a server with `memory` bytes for it (None: unknown)."""
    yield f"{plan.slots} sequences at a time, each of up to {plan.context:,} tokens"
    yield "memory:"
    pages = f"{plan.kv_cache // plan.page:,} pages of {PAGE} tokens, {size_text(plan.page)} each"
    parts = [
        ("weights", plan.weights, ""),
        ("KV cache", plan.kv_cache, pages),
        ("adapters", plan.adapters, "LoRA matrices of all adapters"),
        ("activations", plan.activations, "of a step of all sequences, or of a chunk of a prompt"),
        ("in all", plan.total, ""),
    ]
    for name, size, note in parts:
        yield f"  {name:<18}{size_text(size):>12}  {size:>15,} bytes{'  ' + note if note else ''}"
    if memory is not None:
        free = memory - plan.total
        verdict, more = ("fits", f"{size_text(free)} left") if free >= 0 else (
            "does not fit", f"{size_text(-free)} too much"
        )  # fmt: skip
        yield f"{verdict}: {size_text(plan.total)} of {size_text(memory)}, {more}"
