"""The error of this package, and how long lists are shown in it."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 10


class CheckpointError(ValueError):
    """A checkpoint cannot be read, does not fit, or cannot be written.

    The message names the file, the tensor or key, and the remedy.
    """


def capped(items: Sequence[str], separator: str = ", ") -> str:
    """Joins the first ten items and says how many were left out."""
    shown = list(items[:_SHOWN])
    if len(items) > _SHOWN:
        shown.append(f"... and {len(items) - _SHOWN} more")
    return separator.join(shown)
