"""What every reader of a single file offers, and how a file is recognized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from glm_ms.storage.errors import CheckpointError

RANK, RANKS = "rank", "ranks"  # in the header of a slice: whose it is, and of how many
# What the first bytes give away, for messages about files that are not what their ending says.
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<", "a web page or XML, not weights; download it again"),
    (b"PK\x03\x04", "a ZIP archive as PyTorch writes; name it .bin"),
    (b"\x80", "a Python pickle as PyTorch once wrote; name it .bin"),
    (b"\n", "perhaps a MindSpore checkpoint; name it .ckpt"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type (a name of `dtypes.DTYPES`, or the file's own word where that has none)."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile(ABC):
    """One file of tensors, under the names it holds.

    Attributes:
        path: the file.
        entries: stored name -> `TensorInfo`, in the order of the file.
        metadata: free text of its header; empty where the format has none.
    """

    metadata: Mapping[str, str] = MappingProxyType({})
    path: Path
    entries: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A fresh array with the tensor `name`, in the storage type of its dtype.

        Raises:
            CheckpointError: the file cannot be read, or has changed since it was opened.
        """

    @abstractmethod
    def release(self) -> None:
        """Lets go of memory and file handles; a later `read` takes them again."""


def slice_metadata(rank: int, ranks: int) -> dict[str, str]:
    """What the header of a safetensors file says of the slice in it."""
    return {RANK: str(rank), RANKS: str(ranks)}


def describe_content(head: bytes) -> str:
    """Says in words what the first bytes of a file look like."""
    if not head:
        return "empty"
    if head[8:9] == b"{":
        return "a safetensors file; name it .safetensors"
    return next((text for start, text in _SIGNATURES if head.startswith(start)), "of no known format")


def read_array(file: BinaryIO, offset: int, array: np.ndarray, path: Path) -> None:
    """Fills a contiguous array with the bytes of `file` from `offset` on, without a second buffer."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{path}: ends too early; the file is truncated, fetch it again")
        done += count
