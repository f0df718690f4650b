"""Calls C++ kernels on NumPy arrays, for tests."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from glm_ms.ops.cpu import build, library
from glm_ms.ops.packing import Packed

DRIVER = Path(__file__).resolve().parent / "ops" / "cpu" / "driver.cpp"
FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}


def kernels() -> ctypes.CDLL:
    """The library; skips the test where none can be built."""
    if library.reason() is not None:
        pytest.skip(f"no C++ kernels: {library.reason()}")
    return library.load()


@contextmanager
def threads(count: int):
    """`count` threads inside the block."""
    before = kernels().glm_ms_threads()
    kernels().glm_ms_set_threads(count)
    try:
        yield
    finally:
        kernels().glm_ms_set_threads(before)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 as uint16, rounded to nearest even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pointer(array: np.ndarray | None) -> int | None:
    """Address of the first value of a contiguous array, or None."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def product(
    weight: np.ndarray | Packed,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    into: np.ndarray | None = None,
    library: ctypes.CDLL | None = None,
) -> np.ndarray:
    """y = x W^T + bias, float32 [m, n]; added to a copy of `into` if given. uint16 weights are bits of bfloat16."""
    if isinstance(weight, Packed):
        data, scale, (n, k), group = weight
        kind = FORMATS["int4" if group else "int8"]
    else:
        data, scale, (n, k), group = np.ascontiguousarray(weight), None, weight.shape, 0
        kind = FORMATS["bfloat16" if weight.dtype == np.uint16 else weight.dtype.name]
    x = np.ascontiguousarray(x, np.float32)
    y = np.full((len(x), n), np.nan, np.float32) if into is None else into.copy()
    (library or kernels()).glm_ms_product(
        kind,
        pointer(data),
        pointer(scale),
        n,
        k,
        group,
        pointer(x),
        k,
        len(x),
        pointer(y),
        n,
        pointer(bias),
        into is not None,
    )
    return y


def build_driver(
    output: Path,
    compiler: str = "",
    machine: str | None = None,
    options: Sequence[str] = (),
    flags: dict[str, Sequence[str]] | None = None,
) -> Path:
    """Links driver.cpp with the kernels; `flags` replaces the options of single files by name."""
    try:
        command = [*(compiler or build.find_compiler()).split(), *build.FLAGS, *options, f"-I{build.SOURCES}"]
    except build.BuildError as error:
        pytest.skip(str(error))
    files = {**build.source_files(machine), DRIVER: ()}
    objects = [output.with_name(f"{path.stem}.o") for path in files]

    def compile_file(path: Path, own: Sequence[str], to: Path) -> None:
        own = (flags or {}).get(path.name, own)
        run([*command, *own, '-DGLM_MS_SOURCES=""', "-c", str(path), "-o", str(to)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_file, files, files.values(), objects))
    run([*command, "-o", str(output), *map(str, objects)])
    return output


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program; a failure shows its last lines."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
