"""Writes the checkpoints of many ranks at once, tensor by tensor: `<folder>/rank_N/<prefix>N.ckpt`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from glm_ms.convert import mindspore_file, safetensors_file
from glm_ms.convert.dtypes import DTYPES
from glm_ms.convert.errors import CheckpointError
from glm_ms.convert.tensor_file import TensorInfo

FORMATS = ("ckpt", "safetensors")


class RankWriter:
    """Appends tensors to one file a rank; a file is open only while it is written to.

    Args:
        folder: existing empty folder.
        prefix: file names are `<prefix><rank>.<kind>`, as mindspore.transform_checkpoints names them.
        kind: "ckpt" or "safetensors".
        tensors: per rank what will be written, in that order.

    Raises:
        OSError: a folder or file cannot be written.
    """

    def __init__(self, folder: Path, prefix: str, kind: str, tensors: list[dict[str, TensorInfo]]) -> None:
        self._kind = kind
        self._pending = [list(reversed(announced.items())) for announced in tensors]
        self._files = []
        for rank, announced in enumerate(tensors):
            file = folder / rank_file(rank, prefix, kind)
            file.parent.mkdir()
            with file.open("xb") as stream:
                if kind == "safetensors":
                    safetensors_file.write_header(stream, announced, {"format": "ms"})
            self._files.append(file)

    def append(self, rank: int, name: str, array: np.ndarray) -> None:
        """Writes the next tensor of a rank, given in the storage type of its dtype.

        Raises:
            CheckpointError: it is not the one announced.
            OSError: the file cannot be written.
        """
        expected, info = (
            self._pending[rank].pop() if self._pending[rank] else ("the end", TensorInfo((), "bool"))
        )
        if (name, array.shape, array.dtype) != (expected, info.shape, DTYPES[info.dtype].storage):
            raise CheckpointError(
                f"rank {rank}: {name} {list(array.shape)}: announced was {expected} {list(info.shape)}"
            )
        with self._files[rank].open("ab") as stream:
            if self._kind == "ckpt":
                mindspore_file.write_tensor(stream, name, info, array)
            else:
                safetensors_file.write_tensor(stream, array)

    def finish(self) -> None:
        """Holds the files to what was announced, and puts them on the disk."""
        for rank, file in enumerate(self._files):
            if self._pending[rank]:
                raise CheckpointError(
                    f"rank {rank}: {self._pending[rank][-1][0]}: announced, but never given"
                )
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def rank_file(rank: int, prefix: str, kind: str) -> Path:
    """The file of a rank, relative to the folder of all ranks."""
    return Path(f"rank_{rank}") / f"{prefix}{rank}.{kind}"
