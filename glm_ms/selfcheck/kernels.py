"""Fused kernels against portable operators, portable operators against NumPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm_ms.ops import ascend
from glm_ms.ops.attention import HIDDEN_SCORE, GroupedAttention
from glm_ms.ops.norm import RMSNormalize
from glm_ms.ops.quantized import QuantizedMatMul
from glm_ms.ops.rotary import ApplyRotary, rotary_tables
from glm_ms.selfcheck.rows import Row, guarded

# Distance from 1 to the next number, by which differences are measured.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_REPEATS = 10
_EPS_OF_NORM = 1e-5
# A gradient passes through the kernel and its adjoint.
_GRADIENT_FACTOR = 2
# Half types are summed in float32, so that their last place is lost a few times only; float32 itself loses more.
_FLOAT32_FACTOR = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network's operators: rows, tokens of a row, widths, heads, key/value groups, channels of a head."""

    batch: int
    length: int
    hidden: int
    heads: int
    groups: int
    dim: int
    out: int


SMALL = Sizes(batch=2, length=24, hidden=64, heads=4, groups=2, dim=16, out=352)
# Of ChatGLM2-6B and ChatGLM3-6B; `out` is dense_h_to_4h.
REAL = Sizes(batch=1, length=1024, hidden=4096, heads=32, groups=2, dim=128, out=2 * 13696)


@dataclass(frozen=True)
class KernelCase:
    """One operator with inputs.

    Args:
        kernel: its name.
        shape: of its main input.
        portable, fused: build the cells, given the type.
        inputs: float32 ones take the type under test unless `kept`.
        kept: positions of the inputs that keep their own type.
        differentiable: positions of the inputs whose gradients are compared.
        exact: the result by NumPy in float64.
        roundings: allowed difference, in units of the last place of the largest result. In float16 the portable
            operators themselves differ from the exact result by a tenth to a fifth of it.
    """

    kernel: str
    shape: str
    portable: Callable[[ms.Type], nn.Cell]
    fused: Callable[[], nn.Cell]
    inputs: tuple[np.ndarray, ...]
    kept: tuple[int, ...]
    differentiable: tuple[int, ...]
    exact: Callable[..., np.ndarray]
    roundings: int

    def tensors(self, dtype: str) -> list[Tensor]:
        """The inputs in the type under test."""
        return [
            Tensor(array) if i in self.kept else Tensor(array, getattr(ms, dtype))
            for i, array in enumerate(self.inputs)
        ]


def kernel_cases(sizes: Sizes) -> list[KernelCase]:
    """The four operators at the given sizes, with seeded normal inputs; attention also for a single new token."""
    rng = np.random.default_rng(0)
    return [
        _norm_case(sizes, rng),
        _rotary_case(sizes, rng),
        _attention_case(sizes, rng, sizes.length),
        _attention_case(sizes, rng, 1),
        _quantized_case(sizes, rng),
    ]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _by(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _norm_case(sizes: Sizes, rng: np.random.Generator) -> KernelCase:
    def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + _EPS_OF_NORM) * weight

    shape = (sizes.batch, sizes.length, sizes.hidden)
    inputs = (_normal(rng, *shape), 1 + 0.2 * _normal(rng, sizes.hidden))
    return KernelCase(
        "RMS norm", _by(*shape), lambda _: RMSNormalize(_EPS_OF_NORM),
        lambda: ascend.FusedRMSNormalize(_EPS_OF_NORM), inputs, (), (0, 1), exact, 2,
    )  # fmt: skip


def _rotary_case(sizes: Sizes, rng: np.random.Generator) -> KernelCase:
    def exact(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
        return x * cos + turned * sin

    shape = (sizes.batch, sizes.length, sizes.heads + sizes.groups, sizes.dim)
    tables = (
        np.repeat(table[None, :, None], sizes.batch, axis=0)
        for table in rotary_tables(sizes.length, sizes.dim)
    )
    return KernelCase(
        "rotary embedding", _by(*shape), lambda dtype: ApplyRotary(sizes.dim, dtype),
        ascend.FusedRotary, (_normal(rng, *shape), *tables), (), (0,), exact, 4,
    )  # fmt: skip


def _attention_case(sizes: Sizes, rng: np.random.Generator, length: int) -> KernelCase:
    """The last `length` tokens look at all of them; the first keys of the last row are padding."""

    def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
        per_group = sizes.heads // sizes.groups
        key, value = np.repeat(key, per_group, axis=1), np.repeat(value, per_group, axis=1)
        scores = np.einsum("bsnd,bntd->bnst", query, key) / np.sqrt(sizes.dim) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bnst,bntd->bsnd", weights / weights.sum(-1, keepdims=True), value)
        return mixed.reshape(sizes.batch, length, -1)

    keys = (sizes.batch, sizes.groups, sizes.length, sizes.dim)
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
        name, f"{_by(*shape)}, {sizes.groups}x{sizes.length}",
        lambda _: GroupedAttention(sizes.heads, sizes.groups, sizes.dim),
        lambda: ascend.FlashAttention(sizes.heads, sizes.dim),
        (_normal(rng, *shape), _normal(rng, *keys), _normal(rng, *keys), bias), (3,),
        (0, 1, 2) if length > 1 else (), exact, 4,
    )  # fmt: skip


def _quantized_case(sizes: Sizes, rng: np.random.Generator) -> KernelCase:
    def exact(x: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x @ (weight * scale[:, None]).T

    shape = (sizes.batch * sizes.length, sizes.hidden)
    weight = rng.integers(-127, 128, (sizes.out, sizes.hidden), np.int8)
    scale = (0.02 / 127 * (1 + rng.random(sizes.out))).astype(np.float32)
    return KernelCase(
        "int8 matmul", f"{_by(*shape)}, {sizes.out}", lambda _: QuantizedMatMul(),
        ascend.FusedQuantizedMatMul, (_normal(rng, *shape), weight, scale), (1, 2), (0,), exact, 4,
    )  # fmt: skip


def portable_rows(sizes: Sizes) -> Iterator[Row]:
    """Every portable operator in float32 against NumPy."""
    for case in kernel_cases(sizes):
        yield guarded(case.kernel, case.shape, "float32", lambda case=case: _portable_row(case))


def fused_rows(sizes: Sizes, dtype: str) -> Iterator[Row]:
    """Every fused kernel against the portable operator, forward and, where it is trained through, backward."""
    for case in kernel_cases(sizes):
        yield guarded(case.kernel, case.shape, dtype, lambda case=case: _fused_row(case, dtype))
        if case.differentiable:
            name = f"{case.kernel}, gradient"
            yield guarded(name, case.shape, dtype, lambda case=case: _gradient_row(case, dtype))


def _portable_row(case: KernelCase) -> Row:
    found, elapsed = _timed(case.portable(ms.float32), case.tensors("float32"))
    expected = case.exact(*(array.astype(np.float64) for array in case.inputs))
    difference, allowed = _compare([found], [expected], "float32", case.roundings * _FLOAT32_FACTOR)
    return Row(case.kernel, case.shape, "float32", difference, allowed, None, elapsed)


def _fused_row(case: KernelCase, dtype: str) -> Row:
    inputs = case.tensors(dtype)
    expected, portable_ms = _timed(case.portable(getattr(ms, dtype)), inputs)
    found, fused_ms = _timed(case.fused(), inputs)
    difference, allowed = _compare([found], [_array(expected)], dtype, case.roundings)
    return Row(case.kernel, case.shape, dtype, difference, allowed, fused_ms, portable_ms)


class _Weighed(nn.Cell):
    """Sum of a cell's result times given weights: a scalar with a gradient that is not all ones."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__()
        self.cell = cell
        self.total = ops.ReduceSum()

    def construct(self, weights: Tensor, *inputs: Tensor) -> Tensor:
        """weights float32 of the shape of the result -> float32 scalar."""
        return self.total(ops.cast(self.cell(*inputs), ms.float32) * weights)


class _Gradients(nn.Cell):
    """Gradients of `_Weighed` for the inputs of the cell at the given positions."""

    def __init__(self, cell: nn.Cell, positions: Sequence[int]) -> None:
        super().__init__()
        self.gradients = ops.grad(_Weighed(cell), tuple(i + 1 for i in positions))

    def construct(self, weights: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As `_Weighed.construct` -> the gradients."""
        return self.gradients(weights, *inputs)


def _gradient_row(case: KernelCase, dtype: str) -> Row:
    inputs = case.tensors(dtype)
    portable = case.portable(getattr(ms, dtype))
    shape = portable(*inputs).shape
    inputs = [Tensor(_normal(np.random.default_rng(1), *shape)), *inputs]
    expected, portable_ms = _timed(_Gradients(portable, case.differentiable), inputs)
    found, fused_ms = _timed(_Gradients(case.fused(), case.differentiable), inputs)
    difference, allowed = _compare(
        _listed(found), list(map(_array, _listed(expected))), dtype, case.roundings * _GRADIENT_FACTOR
    )
    return Row(f"{case.kernel}, gradient", case.shape, dtype, difference, allowed, fused_ms, portable_ms)


def _listed(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _timed(cell: nn.Cell, inputs: Sequence[Tensor]) -> tuple[Tensor | tuple[Tensor, ...], float]:
    """Result, and milliseconds of a call after the one that compiles. The device is waited for."""
    result = cell(*inputs)
    _array(_listed(result)[0])
    start = time.perf_counter()
    for _ in range(_REPEATS):
        result = cell(*inputs)
    _array(_listed(result)[0])
    return result, (time.perf_counter() - start) / _REPEATS * 1e3


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


def _compare(
    found: Sequence[Tensor], expected: Sequence[np.ndarray], dtype: str, roundings: int
) -> tuple[float, float]:
    """Largest difference and allowed one, of the result that is nearest to its limit or farthest beyond.

    Raises:
        ValueError: a result has another shape than it should.
    """
    worst = (0.0, 0.0, -1.0)
    for tensor, wanted in zip(found, expected):
        if tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"shape {tuple(tensor.shape)}, expected {wanted.shape}")
        difference = float(np.abs(_array(tensor) - wanted).max())
        allowed = float(roundings * EPS[dtype] * np.abs(wanted).max())
        ratio = difference / allowed if allowed and difference == difference else float("inf")
        if ratio > worst[2]:
            worst = (difference, allowed, ratio)
    return worst[:2]
