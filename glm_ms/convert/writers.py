"""Writes checkpoints tensor by tensor: Hugging Face folders, and single `.safetensors` or `.ckpt` files."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from glm_ms.convert.dtypes import DTYPES, check_float_type, convert_dtype
from glm_ms.convert.mindspore_file import write_mindspore
from glm_ms.convert.names import INV_FREQ, inverse_frequencies, to_hf_name
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.model.config import GLMConfig
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.errors import CheckpointError

FILE_ENDINGS = (".safetensors", ".ckpt")
DEFAULT_SHARD_SIZE = 2_000_000_000  # bytes
_MARGIN = 1_000_000  # bytes left for headers, index and config

Shapes = dict[str, tuple[int, ...]]
Parameters = Iterable[tuple[str, np.ndarray]]


def size_in_bytes(shapes: Shapes, dtype: str) -> int:
    """Bytes of all tensors together, stored as `dtype`."""
    return sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].storage.itemsize


def write_file(path: str | Path, shapes: Shapes, dtype: str, parameters: Parameters, overwrite: bool = False) -> None:
    """Writes one `.safetensors` or `.ckpt` with glm_ms names; both load in MindSpore.

    Args:
        path: output, whole or not written at all; its ending selects the format.
        shapes: glm_ms name -> shape, in the order of `parameters`.
        dtype: "float32", "float16" or "bfloat16".
        parameters: (name, array) pairs in the type `dtype` (bfloat16 as uint16 bit patterns), consumed one
            at a time.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: the output exists or cannot be written, or a parameter differs from `shapes`.
    """
    path = Path(path)
    if path.suffix not in FILE_ENDINGS:
        raise CheckpointError(f"{path}: must end in {' or '.join(FILE_ENDINGS)}")
    with atomic_output(path, overwrite=overwrite) as work:
        check_space(work.parent, path, size_in_bytes(shapes, dtype))
        arrays = _checked(shapes, dtype, parameters)
        if path.suffix == ".ckpt":
            write_mindspore(work, shapes, dtype, arrays)
        else:
            write_safetensors(work, shapes, dtype, arrays, {"format": "ms"})
        _check_exhausted(arrays)


def write_hf_folder(
    path: str | Path,
    config: GLMConfig,
    shapes: Shapes,
    dtype: str,
    parameters: Parameters,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    extra_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """Writes a Hugging Face folder: config.json and `model.safetensors`, or shards with their index.

    Args:
        path: output folder, whole or not written at all.
        config: for config.json, with `dtype` as torch_dtype.
        shapes: glm_ms name -> shape, in the order of `parameters`.
        dtype: "float32", "float16" or "bfloat16".
        parameters: (glm_ms name, array) pairs in the type `dtype`, consumed one at a time.
        max_shard_size: bytes of tensors in one file; a larger tensor has a separate file.
        extra_files: copied into the folder, such as those of the tokenizer.
        overwrite: replace an existing checkpoint folder.

    Raises:
        CheckpointError: the output exists or cannot be written, or a parameter differs from `shapes`.
    """
    path = Path(path)
    inv_freq = convert_dtype(inverse_frequencies(config), "float32", dtype, INV_FREQ)
    hf_shapes = {to_hf_name(name, config): shape for name, shape in shapes.items()}
    hf_shapes[INV_FREQ] = inv_freq.shape
    shards = _split(hf_shapes, dtype, max_shard_size)
    with atomic_output(path, folder=True, overwrite=overwrite) as work:
        check_space(work, path, size_in_bytes(hf_shapes, dtype))
        arrays = _checked(hf_shapes, dtype, _renamed(parameters, config, inv_freq))
        for file, shard in shards.items():
            write_safetensors(work / file, shard, dtype, arrays, {"format": "pt"})
        _check_exhausted(arrays)
        if len(shards) > 1:
            _write_json(
                work / "model.safetensors.index.json",
                {
                    "metadata": {"total_size": size_in_bytes(hf_shapes, dtype)},
                    "weight_map": {name: file for file, shard in shards.items() for name in shard},
                },
            )
        stored_config = dataclasses.replace(config, param_init_type=dtype)
        _write_json(work / "config.json", stored_config.to_hf_dict())
        for extra in extra_files:
            shutil.copyfile(extra, work / extra.name)


def _checked(shapes: Shapes, dtype: str, parameters: Parameters) -> Iterator[np.ndarray]:
    """Checks every array against the header, which is written first."""
    check_float_type(dtype)
    storage = DTYPES[dtype].storage
    pending = iter(shapes.items())
    for name, array in parameters:
        expected, shape = next(pending, ("the end", ()))
        if name != expected or array.shape != tuple(shape) or array.dtype != storage:
            raise CheckpointError(
                f"{name} {list(array.shape)} {array.dtype}: expected {expected} {list(shape)} {storage}"
            )
        yield array
        del array  # so that memory has one tensor, not two, while the next is read
    absent = next(pending, None)
    if absent is not None:
        raise CheckpointError(f"{absent[0]}: expected, but missing")


def _check_exhausted(arrays: Iterator[np.ndarray]) -> None:
    """Runs the last check of `_checked`, which is after the last array."""
    if next(arrays, None) is not None:
        raise CheckpointError("more arrays than names")


def _renamed(parameters: Parameters, config: GLMConfig, inv_freq: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in parameters:
        yield to_hf_name(name, config), array
        del array
    yield INV_FREQ, inv_freq


def _split(shapes: Shapes, dtype: str, max_shard_size: int) -> dict[str, Shapes]:
    """File name -> the tensors in it, filled in order."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = size_in_bytes({name: shape}, dtype)
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def check_space(folder: Path, path: Path, needed: int) -> None:
    """Checks free disk space before writing.

    Raises:
        CheckpointError: `path`, in `folder`, needs more than is free.
    """
    free = shutil.disk_usage(folder).free
    if needed + _MARGIN > free:
        raise CheckpointError(
            f"{path}: needs {(needed + _MARGIN) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk"
        )


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
