"""Rows of the device check and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

from glm_ms.ascend_hints import essence, hints
from glm_ms.kernels.compare import DEVICE_ERRORS

_COLUMNS = (("check", 28), ("shape", 25), ("dtype", 8), ("max diff", 9), ("allowed", 9), ("ms fused", 9),
            ("ms portable", 11))  # fmt: skip
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Row:
    """One comparison: what was compared, of which sizes, computed in which type.

    Args:
        difference: largest absolute difference, or number of differing tokens; None after an error.
        allowed: largest difference that passes.
        fused_ms, portable_ms: milliseconds of one call; None: not run.
        message: the error.
    """

    check: str
    shape: str
    dtype: str
    difference: float | None = None
    allowed: float | None = None
    fused_ms: float | None = None
    portable_ms: float | None = None
    message: str = ""

    @property
    def passed(self) -> bool:
        """A NaN never passes."""
        return self.difference is not None and self.allowed is not None and self.difference <= self.allowed


# Difference, allowed difference, milliseconds fused and portable; see `Row`.
Numbers = tuple[Optional[float], Optional[float], Optional[float], Optional[float]]


def guarded(check: str, shape: str, dtype: str, compute: Callable[[], Numbers]) -> Row:
    """The row that `compute` gives, or a failed one with the error: the checks after a broken kernel still run."""
    try:
        return Row(check, shape, dtype, *compute())
    except DEVICE_ERRORS as error:
        return Row(check, shape, dtype, message=f"{type(error).__name__}: {error}")


def head_lines() -> list[str]:
    """The head of the table."""
    titles = " | ".join(title.ljust(width) for title, width in _COLUMNS)
    return [f"{titles} | result", "-+-".join("-" * width for _, width in _COLUMNS) + "-+-------"]


def row_lines(row: Row) -> Iterator[str]:
    """A row, followed by its error and hints on that, if there is one."""
    numbers = (*map(_number, (row.difference, row.allowed)), *map(_milliseconds, (row.fused_ms, row.portable_ms)))
    cells = (row.check, row.shape, row.dtype, *numbers)
    texts = " | ".join(cell.ljust(width) for cell, (_, width) in zip(cells, _COLUMNS))
    yield f"{texts} | {'pass' if row.passed else 'FAIL'}"
    if row.message:
        text = " ".join(essence(row.message).split())
        yield "    " + (text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ...")
        for hint in hints(row.message):
            yield f"    hint: {hint}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value % 1 else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
