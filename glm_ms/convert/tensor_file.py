"""What all readers of one file of tensors share, and how the content of a file is recognized."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glm_ms.convert.dtypes import DTYPES
from glm_ms.storage.errors import CheckpointError

RANK, RANKS = "rank", "ranks"  # keys in the header of a slice: its rank, and the number of ranks
# First bytes -> content, for messages about files with a wrong ending.
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<", "a web page or XML, not weights; download it again"),
    (b"PK\x03\x04", "a ZIP archive as PyTorch writes; name it .bin"),
    (b"\x80", "a Python pickle as PyTorch once wrote; name it .bin"),
    (b"\n", "perhaps a MindSpore checkpoint; name it .ckpt"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type: a name of `dtypes.DTYPES`, or that of the file if the table lacks it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in a file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].storage.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


class TensorFile:
    """One file of tensors. Subclasses parse it and fill the attributes; the file is opened on the first `read`.

    Attributes:
        path: the file.
        entries: stored name -> `TensorInfo`, in the order of the file.
        spans: stored name -> (offset, length) of the pieces of its content.
        metadata: free text of its header; empty if the format has none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self.entries: dict[str, TensorInfo] = {}
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self._file: BinaryIO | None = None

    def readable(self, name: str) -> TensorInfo:
        """Shape and type of a tensor; raises CheckpointError if NumPy has no such type."""
        info = self.entries[name]
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name}: type {info.dtype} cannot be read")
        return info

    def read(self, name: str) -> np.ndarray:
        """A new array with a tensor, in the storage type of its dtype; raises CheckpointError if it cannot be read."""
        info = self.readable(name)
        try:
            array = np.empty(info.shape, DTYPES[info.dtype].storage)
        except (ValueError, OverflowError) as error:  # more dimensions, or a longer one, than NumPy has
            raise CheckpointError(f"{self.path}: {name}: shape {list(info.shape)} cannot be read: {error}") from None
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            for offset, length in self.spans[name]:
                self._file.seek(offset)
                end = done + length
                while done < end:
                    count = self._file.readinto(view[done:end])  # type: ignore[attr-defined]
                    if not count:
                        raise CheckpointError(f"{self.path}: ends too early; the file is truncated, fetch it again")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        return array

    def map(self, name: str) -> np.ndarray:
        """As `read`; where the format stores a tensor in one piece, a `numpy.memmap` whose pages are read when they are
        used and are shared with other processes. Writing to it does not change the file."""
        pieces, info = self.spans.get(name, []), self.entries[name]
        if len(pieces) != 1 or info.dtype not in DTYPES or info.nbytes == 0:
            return self.read(name)
        storage = DTYPES[info.dtype].storage
        if pieces[0][0] % storage.itemsize:
            return self.read(name)
        try:
            return np.memmap(self.path, storage, "c", pieces[0][0], info.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name}: cannot be mapped: {error}") from None

    def verify(self) -> None:
        """Reads the file once and compares it with the checksums in it, where the format has some that opening does
        not compare; raises CheckpointError if it is damaged."""

    def release(self) -> None:
        """Frees memory and closes the file; a later `read` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def forget_pages(array: np.ndarray) -> None:
    """Takes the pages of a mapped array, which nobody has written to, out of the memory of the process. They stay in
    the cache of the system, and come back when they are used."""
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


def slice_metadata(rank: int, ranks: int) -> dict[str, str]:
    """Header of a safetensors file with the slices of one rank."""
    return {RANK: str(rank), RANKS: str(ranks)}


def described_slice(file: TensorFile) -> str | None:
    """Rank and number of ranks, as "rank 1 of 8", if the header says that the file has slices; else None."""
    if file.metadata.get(RANKS, "1") == "1":
        return None
    return f"rank {file.metadata.get(RANK)} of {file.metadata[RANKS]}"


def describe_content(head: bytes) -> str:
    """What a file is, by its first bytes."""
    if not head:
        return "empty"
    if head[8:9] == b"{":
        return "a safetensors file; name it .safetensors"
    return next((text for start, text in _SIGNATURES if head.startswith(start)), "of no known format")
