"""Strategy files and sliced checkpoints made by the tests, independently of the code under test."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from glm_ms.convert.dtypes import DTYPES
from glm_ms.convert.mindspore_file import MindSporeFile, write_tensor
from glm_ms.convert.safetensors_file import SafetensorsFile
from glm_ms.convert.tensor_file import TensorInfo

SHARED = Path(os.environ.get("GLM_MS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GOLDEN = SHARED / "golden_strategy"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no {GOLDEN} (set GLM_MS_SHARED)")


class Cut(NamedTuple):
    """One layout as a strategy file spells it."""

    matrix: list[int]
    tensor_map: list  # numbers from the right, or a list of them where several axes cut a dimension
    step: int = 0
    size: int = 0


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _dims(numbers: list[int]) -> bytes:
    return b"".join(_number(1, number) for number in numbers)


def strategy_bytes(cuts: Mapping[str, Cut], stage: int = 0, field: int = 0, parts: tuple[int, ...] = ()) -> bytes:
    """A strategy file as MindSpore saves it: one operator, and the parameters."""
    data = _number(1, 2) + _message(2, _message(1, b"MatMul") + _message(2, _number(1, stage)))
    for name, cut in cuts.items():
        layout = _message(1, _dims(cut.matrix))
        if any(isinstance(entry, list) for entry in cut.tensor_map):
            entries = [entry if isinstance(entry, list) else [entry] for entry in cut.tensor_map]
            for entry in entries + [[]] * (len(entries) == 1):  # so MindSpore tells [[1, 0]] from [1, 0]
                layout += _message(2, _dims(entry))
        else:
            layout += _message(2, _dims(cut.tensor_map))
        layout += _message(3, _dims(list(parts))) + _message(4, b"")
        layout += _number(5, field) + _number(6, cut.step) + _number(7, cut.size)
        data += _message(3, _message(1, name.encode()) + _message(2, layout))
    return data


def part_of(array: np.ndarray, cut: Cut, rank: int) -> np.ndarray:
    """What a rank of a stage holds of an array."""
    place = np.unravel_index(rank % int(np.prod(cut.matrix)), cut.matrix)
    used = set()
    for dimension, entry in enumerate(cut.tensor_map):
        for number in entry if isinstance(entry, list) else [entry]:
            if number != -1:
                axis = len(cut.matrix) - 1 - number
                used.add(axis)
                array = np.split(array, cut.matrix[axis], axis=dimension)[place[axis]]
    free = [axis for axis in range(len(cut.matrix)) if axis not in used]
    copies = int(np.prod([cut.matrix[axis] for axis in free]))
    pieces = {0: 1, -1: copies}.get(cut.size, cut.size) if cut.step else 1
    number = (
        int(np.ravel_multi_index([place[axis] for axis in free], [cut.matrix[axis] for axis in free])) if free else 0
    )
    return np.split(array, pieces)[number % pieces] if pieces > 1 else array


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A `.ckpt` with these arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for name, array in arrays.items():
            write_tensor(file, name, TensorInfo(array.shape, array.dtype.name), array)
    return path


def load(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> type, shape and bytes of every tensor."""
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else MindSporeFile(path)
    return {name: (info.dtype, info.shape, file.read(name).tobytes()) for name, info in file.entries.items()}


def as_stored(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What `load` gives of a checkpoint with these arrays."""
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def save_ranks(
    folder: Path, arrays: Mapping[str, np.ndarray], cuts: Mapping[str, Cut], ranks: int, name: str = "net"
) -> Path:
    """The slices of all ranks; what has no cut is on every rank."""
    for rank in range(ranks):
        parts = {
            key: np.ascontiguousarray(part_of(array, cuts[key], rank)) if key in cuts else array
            for key, array in arrays.items()
        }
        save(folder / f"rank_{rank}" / f"{name}.ckpt", parts)
    return folder


def random_arrays(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 arrays."""
    rng = np.random.default_rng(seed)
    assert DTYPES["float32"].storage == np.float32
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
