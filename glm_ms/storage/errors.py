"""Errors about files, and how messages shorten long lists."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 10


class FileError(ValueError):
    """A file cannot be read or written, or its content is wrong. The message names file, key and remedy."""


class CheckpointError(FileError):
    """A checkpoint cannot be read, does not fit, or cannot be written. The message names file, tensor and remedy."""


class DataError(FileError):
    """A data file, or a setting for it, cannot be used. The message names file, line and remedy."""


def capped(items: Sequence[str], separator: str = ", ") -> str:
    """Joins the first ten items and counts the rest."""
    shown = list(items[:_SHOWN])
    if len(items) > _SHOWN:
        shown.append(f"... and {len(items) - _SHOWN} more")
    return separator.join(shown)
