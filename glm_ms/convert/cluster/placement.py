"""Files of a transformed checkpoint, written tensor by tensor: `<folder>/rank_N/<prefix>N.ckpt`, or an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_ms.convert import mindspore_file, safetensors_file
from glm_ms.convert.adapter_files import AdapterFiles
from glm_ms.convert.dtypes import DTYPES
from glm_ms.convert.names import is_training_state
from glm_ms.convert.tensor_file import TensorInfo, slice_metadata
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.run_folder import OPTIMIZER

FORMATS = ("ckpt", "safetensors")


@dataclass(frozen=True)
class Placement:
    """Files of the output, and names of tensors in them. A file is open only during a write.

    Attributes:
        prefix: file names are `rank_N/<prefix>N.<kind>`, as those of mindspore.transform_checkpoints.
        kind: one of `FORMATS`.
        ranks: number of ranks of the output.
        adapter: file names if the output is an adapter, which has one rank; else None.
    """

    prefix: str
    kind: str
    ranks: int
    adapter: AdapterFiles | None = None

    def create(self, folder: Path, rank: int, tensors: dict[str, TensorInfo]) -> None:
        """Creates the files of a rank in an existing folder, for these tensors in this order."""
        files: dict[Path, dict[str, TensorInfo]] = {}
        for name, info in tensors.items():
            file, stored = self._home(rank, name)
            files.setdefault(file, {})[stored] = info
        for file, announced in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            with (folder / file).open("xb") as stream:
                if file.suffix == ".safetensors":
                    safetensors_file.write_header(stream, announced, self._metadata(rank, file))

    def append(self, folder: Path, rank: int, name: str, info: TensorInfo, array: np.ndarray) -> None:
        """Writes the next tensor of a rank, given in the storage type of its dtype.

        Raises CheckpointError if its shape or type is not that of `info`.
        """
        file, stored = self._home(rank, name)
        if (array.shape, array.dtype) != (info.shape, DTYPES[info.dtype].storage):
            raise CheckpointError(f"{file}: {stored}: {list(array.shape)} {array.dtype}, expected {info}")
        with (folder / file).open("ab") as stream:
            if file.suffix == ".ckpt":
                mindspore_file.write_tensor(stream, stored, info, array)
            else:
                safetensors_file.write_tensor(stream, array)

    def companion_files(self, name: str) -> list[Path]:
        """Places, in the output folder, for copies of a file that describes the tensors."""
        if self.adapter is not None:
            return [Path(name)] if name == self.adapter.config else []
        folders = [Path(f"rank_{rank}") for rank in range(self.ranks)]
        # Users may also give the parent folder of a single rank_0.
        return [folder / name for folder in ([Path(), *folders] if self.ranks == 1 else folders)]

    def _home(self, rank: int, name: str) -> tuple[Path, str]:
        """The file of a tensor in the output folder, and its name there."""
        if self.adapter is None:
            return Path(f"rank_{rank}") / f"{self.prefix}{rank}.{self.kind}", name
        if is_training_state(name):
            return Path(OPTIMIZER), name
        return Path(self.adapter.weights), self.adapter.stored(name)

    def _metadata(self, rank: int, file: Path) -> dict[str, str]:
        if self.adapter is not None:
            return {"format": "np" if file.name == OPTIMIZER else "pt"}
        return {"format": "ms", **(slice_metadata(rank, self.ranks) if self.ranks > 1 else {})}
