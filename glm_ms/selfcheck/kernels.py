"""Rows of the device check for operators: portable ones against NumPy, fused kernels against portable ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from glm_ms.kernels.cases import KernelCase, Sizes, kernel_cases
from glm_ms.kernels.compare import against_numpy, against_portable
from glm_ms.ops import registry
from glm_ms.selfcheck.rows import Row, guarded


def portable_rows(sizes: Sizes) -> Iterator[Row]:
    """Every portable operator in float32 against NumPy."""
    cases = kernel_cases(sizes)
    for case in cases:
        yield guarded(case.name, case.shape, "float32", partial(against_numpy, case))
    yield from _unchecked(registry.PORTABLE, cases, "float32")


def fused_rows(sizes: Sizes, dtype: str) -> Iterator[Row]:
    """Every fused kernel of this device against the portable operator: results, and gradients if there are any."""
    kernels, cases = registry.operators_of(registry.device()), kernel_cases(sizes)
    for case in cases:
        if case.operator not in kernels:
            continue
        yield guarded(case.name, case.shape, dtype, partial(against_portable, case, dtype))
        if case.differentiable:
            name = f"{case.name}, gradient"
            yield guarded(name, case.shape, dtype, partial(against_portable, case, dtype, gradients=True))
    yield from _unchecked(registry.device(), cases, dtype)


def _unchecked(device: str, cases: Sequence[KernelCase], dtype: str) -> Iterator[Row]:
    """A failed row for every operator that has a cell for the device and no case here."""
    for operator in registry.operators_of(device).keys() - {case.operator for case in cases}:
        yield Row(operator, "-", dtype, message="glm_ms.kernels.cases has no case for this operator")
