"""Writes the checkpoints of many ranks, tensor by tensor: `<folder>/rank_N/<prefix>N.ckpt`, or an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_ms.convert import mindspore_file, safetensors_file
from glm_ms.convert.adapter_files import OPTIMIZER, AdapterFiles
from glm_ms.convert.dtypes import DTYPES
from glm_ms.convert.names import is_training_state
from glm_ms.convert.tensor_file import TensorInfo, slice_metadata
from glm_ms.storage.errors import CheckpointError

FORMATS = ("ckpt", "safetensors")


@dataclass(frozen=True)
class Placement:
    """Files of the output, and names of tensors in them.

    Attributes:
        prefix: file names are `rank_N/<prefix>N.<kind>`, as those of mindspore.transform_checkpoints.
        kind: "ckpt" or "safetensors".
        ranks: number of ranks of the output.
        adapter: file names if the output is an adapter, else None.
    """

    prefix: str
    kind: str
    ranks: int
    adapter: AdapterFiles | None = None

    def file(self, rank: int, name: str) -> Path:
        """File of a tensor, relative to the output folder."""
        if self.adapter is None:
            return Path(f"rank_{rank}") / f"{self.prefix}{rank}.{self.kind}"
        return Path(OPTIMIZER if is_training_state(name) else self.adapter.weights)

    def stored(self, name: str) -> str:
        """The name of a tensor in its file."""
        return name if self.adapter is None or is_training_state(name) else self.adapter.stored(name)

    def metadata(self, rank: int, file: Path) -> dict[str, str]:
        """Metadata of a safetensors file."""
        if self.adapter is not None:
            return {"format": "np" if file.name == OPTIMIZER else "pt"}
        return {"format": "ms", **(slice_metadata(rank, self.ranks) if self.ranks > 1 else {})}

    def companion_files(self, name: str) -> list[Path]:
        """Places for copies of a file that describes the tensors."""
        if self.adapter is not None:
            return [Path(name)] if name == self.adapter.config else []
        folders = [Path(f"rank_{rank}") for rank in range(self.ranks)]
        # Users may also give the parent folder of a single rank_0.
        return [folder / name for folder in ([Path(), *folders] if self.ranks == 1 else folders)]


class RankWriter:
    """Appends tensors to the files of the ranks; a file is open only during a write.

    Args:
        folder: existing empty folder.
        placement: names of files and tensors.
        tensors: the tensors of each rank, in the order in which they will be written.

    Raises:
        OSError: a folder or file cannot be written.
    """

    def __init__(self, folder: Path, placement: Placement, tensors: list[dict[str, TensorInfo]]) -> None:
        self._folder, self._placement = folder, placement
        files: dict[Path, tuple[int, dict[str, TensorInfo]]] = {}
        for rank, announced in enumerate(tensors):
            for name, info in announced.items():
                files.setdefault(placement.file(rank, name), (rank, {}))[1][placement.stored(name)] = info
        self._pending = {file: list(reversed(announced.items())) for file, (_, announced) in files.items()}
        for file, (rank, announced) in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            with (folder / file).open("xb") as stream:
                if file.suffix == ".safetensors":
                    safetensors_file.write_header(stream, announced, placement.metadata(rank, file))

    def append(self, rank: int, name: str, array: np.ndarray) -> None:
        """Writes the next tensor of a rank, given in the storage type of its dtype.

        Raises:
            CheckpointError: it is not the expected one.
            OSError: the file cannot be written.
        """
        file, stored = self._placement.file(rank, name), self._placement.stored(name)
        pending = self._pending[file]
        expected, info = pending.pop() if pending else ("the end", TensorInfo((), "bool"))
        if (stored, array.shape, array.dtype) != (expected, info.shape, DTYPES[info.dtype].storage):
            raise CheckpointError(f"{file}: {stored} {list(array.shape)}: expected {expected} {list(info.shape)}")
        with (self._folder / file).open("ab") as stream:
            if file.suffix == ".ckpt":
                mindspore_file.write_tensor(stream, stored, info, array)
            else:
                safetensors_file.write_tensor(stream, array)

    def finish(self) -> None:
        """Checks that all tensors were written, and syncs the files to the disk."""
        for file, pending in self._pending.items():
            if pending:
                raise CheckpointError(f"{file}: {pending[-1][0]}: expected, but not written")
            with (self._folder / file).open("rb") as stream:
                os.fsync(stream.fileno())
