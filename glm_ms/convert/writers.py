"""Writes checkpoints tensor by tensor: Hugging Face folders, and single `.safetensors` or `.ckpt` files."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
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
    """Writes one `.safetensors` or `.ckpt` (by its ending), whole or not at all; both load in MindSpore.

    Args:
        shapes: glm_ms name -> shape, in the order of `parameters`.
        dtype: "float32", "float16" or "bfloat16".
        parameters: (name, array) pairs in the type `dtype` (bfloat16 as uint16 bit patterns), consumed one by one.

    Raises:
        CheckpointError: the output exists or cannot be written, or a parameter differs from `shapes`.
    """
    path = Path(path)
    if path.suffix not in FILE_ENDINGS:
        raise CheckpointError(f"{path}: must end in {' or '.join(FILE_ENDINGS)}")
    with atomic_output(path, overwrite=overwrite, parents=True) as work:
        check_space(work.parent, path, size_in_bytes(shapes, dtype))
        arrays = _checked(shapes, dtype, parameters)
        if path.suffix == ".ckpt":
            write_mindspore(work, shapes, dtype, arrays)
        else:
            write_safetensors(work, shapes, dtype, arrays, {"format": "ms"})
        next(arrays, None)  # runs the check after the last array


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
    """Writes a Hugging Face folder, as `write_file`: config.json and `model.safetensors`, or shards with their index.

    Args:
        config: for config.json, with `dtype` as torch_dtype.
        max_shard_size: bytes of tensors in one file; a larger tensor has a separate file.
        extra_files: copied into the folder, such as those of the tokenizer.
    """
    inv_freq = convert_dtype(inverse_frequencies(config), "float32", dtype, INV_FREQ)
    hf_shapes = {to_hf_name(name, config): shape for name, shape in shapes.items()}
    hf_shapes[INV_FREQ] = inv_freq.shape
    arrays = _renamed(parameters, config, inv_freq)
    document = dataclasses.replace(config, param_init_type=dtype).to_hf_dict()
    texts = {"config.json": json.dumps(document, indent=2) + "\n"}
    write_folder(path, hf_shapes, dtype, arrays, texts, max_shard_size, extra_files, overwrite)


def write_folder(
    path: str | Path,
    shapes: Shapes,
    dtype: str,
    parameters: Parameters,
    texts: Mapping[str, str],
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    extra_files: Iterable[Path] = (),
    overwrite: bool = False,
) -> None:
    """As `write_hf_folder`, with the names as they are; `texts` are file name -> content."""
    path = Path(path)
    total, shards = size_in_bytes(shapes, dtype), _split(shapes, dtype, max_shard_size)
    with atomic_output(path, folder=True, overwrite=overwrite, parents=True) as work:
        check_space(work, path, total)
        arrays = _checked(shapes, dtype, parameters)
        for file, shard in shards.items():
            write_safetensors(work / file, shard, dtype, arrays, {"format": "pt"})
        next(arrays, None)  # runs the check after the last array
        if len(shards) > 1:
            homes = {name: file for file, shard in shards.items() for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": homes}
            _write_json(work / "model.safetensors.index.json", index)
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        copy_files(extra_files, work)


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies files, such as those of a tokenizer, into a folder under their names."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _checked(shapes: Shapes, dtype: str, parameters: Parameters) -> Iterator[np.ndarray]:
    """Checks every array against the header, which is written first."""
    check_float_type(dtype)
    storage = DTYPES[dtype].storage
    pending = iter(shapes.items())
    for name, array in parameters:
        expected, shape = next(pending, ("the end", ()))
        if name != expected or array.shape != tuple(shape) or array.dtype != storage:
            found = f"{name} {list(array.shape)} {array.dtype}"
            raise CheckpointError(f"{found}: expected {expected} {list(shape)} {storage}")
        yield array
        del array  # so that memory has one tensor, not two, while the next is read
    absent = next(pending, None)
    if absent is not None:
        raise CheckpointError(f"{absent[0]}: expected, but missing")


def _renamed(parameters: Parameters, config: GLMConfig, inv_freq: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in parameters:
        yield to_hf_name(name, config), array
        del array
    yield INV_FREQ, inv_freq


def _split(shapes: Shapes, dtype: str, max_shard_size: int) -> dict[str, Shapes]:
    """File name -> the tensors in it, filled in order."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and size_in_bytes({**shards[-1], name: shape}, dtype) > max_shard_size:
            shards.append({})
        shards[-1][name] = shape
    count = len(shards)
    if count == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def check_space(folder: Path, path: Path, needed: int) -> None:
    """Raises CheckpointError if the disk of `folder` has less free space than `path` needs; call it before writing."""
    needed, free = needed + _MARGIN, shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{path}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on its disk")


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
