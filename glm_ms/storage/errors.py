"""Errors about files, and how messages shorten long lists."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

_SHOWN = 10
_SPACE = "free space on that disk ({free:,.0f} MB are left), or write to another one"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: "free space in your quota, or write to another disk",
    errno.EFBIG: "raise the largest size of a file (ulimit -f), or write to another file system",
    errno.ENOENT: "its folder does not exist, or has been removed or renamed",
    errno.EACCES: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class FileError(ValueError):
    """A file cannot be read or written, or its content is wrong. The message names file, key and remedy."""


class CheckpointError(FileError):
    """A checkpoint cannot be read, does not fit, or cannot be written. The message names file, tensor and remedy."""


class DataError(FileError):
    """A data file, or a setting for it, cannot be used. The message names file, line and remedy."""


class WriteError(FileError, OSError):
    """An output cannot be written. The message names its path, the reason of the system and the remedy."""


def not_written(path: Path, error: OSError) -> str:
    """Message for an output that the system does not take: path, reason, what to do."""
    if isinstance(error, FileError):
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0, "")
    if remedy == _SPACE:
        try:
            remedy = _SPACE.format(free=shutil.disk_usage(path.absolute().parent).free / 1e6)
        except OSError:
            remedy = "free space on that disk"
    return f"{path}: cannot be written: {error.strerror or error}{remedy and f'; {remedy}'}"


def capped(items: Sequence[str], separator: str = ", ") -> str:
    """Joins the first ten items and counts the rest."""
    shown = list(items[:_SHOWN])
    if len(items) > _SHOWN:
        shown.append(f"... and {len(items) - _SHOWN} more")
    return separator.join(shown)
