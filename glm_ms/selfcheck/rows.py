"""Rows of the device check and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glm_ms.ascend_hints import essence, hints

# Everything a kernel that is missing, refused or broken has been seen to raise, and what it would plausibly raise.
DEVICE_ERRORS = (
    RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, MemoryError,
)  # fmt: skip

_COLUMNS = (
    ("check", 28), ("shape", 25), ("dtype", 8), ("max diff", 9), ("allowed", 9),
    ("ms fused", 9), ("ms portable", 11),
)  # fmt: skip
_LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        check: what was compared.
        shape: sizes, for the reader.
        dtype: type that was computed in.
        difference: largest absolute difference, or number of differing tokens; None if it was not reached.
        allowed: largest difference that passes.
        fused_ms, portable_ms: milliseconds of one call; None where it was not run.
        message: why it failed before there was a difference.
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


def guarded(check: str, shape: str, dtype: str, compute: Callable[[], Row]) -> Row:
    """The row that `compute` gives, or a failed one with the error, so that one broken kernel hides no other."""
    try:
        return compute()
    except DEVICE_ERRORS as error:
        return Row(check, shape, dtype, message=f"{type(error).__name__}: {error}")


def head_lines() -> list[str]:
    """The head of the table."""
    titles = " | ".join(title.ljust(width) for title, width in _COLUMNS)
    return [f"{titles} | result", "-+-".join("-" * width for _, width in _COLUMNS) + "-+-------"]


def row_lines(row: Row) -> Iterator[str]:
    """A row, and under a row that broke the error and what is known about it."""
    cells = (
        row.check, row.shape, row.dtype, _number(row.difference), _number(row.allowed),
        _milliseconds(row.fused_ms), _milliseconds(row.portable_ms),
    )  # fmt: skip
    texts = " | ".join(cell.ljust(width) for cell, (_, width) in zip(cells, _COLUMNS))
    yield f"{texts} | {'pass' if row.passed else 'FAIL'}"
    if row.message:
        yield f"    {_short(row.message)}"
        for hint in hints(row.message):
            yield f"    hint: {hint}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value % 1 else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(message: str) -> str:
    """What names the fault, on one line."""
    kept = " ".join(essence(message).split())
    return kept if len(kept) <= _LONGEST_MESSAGE else kept[:_LONGEST_MESSAGE] + " ..."
