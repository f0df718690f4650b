"""Loads the library of C++ kernels. It stays open until the process ends: its threads live in it."""

from __future__ import annotations

import ctypes
import os
import warnings
from ctypes import c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

from glm_ms.ops.cpu.build import LIBRARY, sources_digest

_SETS = "avx512, avx2, neondot, neon, scalar, as far as the processor has them"
SWITCH = "GLM_MS_CPU_KERNELS"  # an environment variable: 0 for the portable operators
_OFF = ("0", "false", "no", "off")
_SWITCHED_OFF = f"{SWITCH}=0"
_BUILD = "build it with `python -m glm_ms.ops.cpu.build` (it needs a C++ compiler)"
# Function -> type of its result, types of its arguments; src/exports*.cpp has them.
_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "glm_ms_isa": (c_char_p, ()),
    "glm_ms_requested_isa_is_missing": (c_int, ()),
    "glm_ms_threads": (c_int, ()),
    "glm_ms_set_threads": (None, (c_int,)),
    "glm_ms_open_blas": (c_int, (c_char_p,)),
    "glm_ms_native_bf16": (c_int, ()),
    "glm_ms_product": (
        None,
        (
            c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64,
            c_void_p, c_int32,
        ),
    ),
}  # fmt: skip


def path() -> Path:
    """Where the library is, or would be."""
    return Path(__file__).resolve().parent / LIBRARY


def is_built() -> bool:
    """Whether the file exists and was built from the sources beside it. Does not keep it open."""
    return path().is_file() and f"sources {sources_digest()}".encode() in path().read_bytes()


def load() -> ctypes.CDLL | None:
    """The library, or None where there is none: `reason` says why. The first call without it warns, unless the
    environment asks for portable operators."""
    library, why = _state()
    if why not in (None, _SWITCHED_OFF):
        _warn(str(why))
    return library


def reason() -> str | None:
    """Why `load` returns None, and the remedy; None if it returns the library."""
    return _state()[1]


def description() -> str:
    """One line for the user: the instruction set, threads and file of the kernels, or why there are none."""
    library, why = _state()
    if library is None:
        return f"none: {why}"
    return f"{library.glm_ms_isa().decode()}, {library.glm_ms_threads()} threads, {path()}"


def _state() -> tuple[ctypes.CDLL | None, str | None]:
    return (None, _SWITCHED_OFF) if os.environ.get(SWITCH, "").lower() in _OFF else _load()


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    file = path()
    if not file.is_file():
        return None, f"{file}: missing; {_BUILD}"
    if not is_built():
        return None, f"{file}: not built from the sources beside it; {_BUILD}"
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{file}: not usable ({error}); {_BUILD}"
    if library.glm_ms_requested_isa_is_missing():
        wanted = os.environ.get("GLM_MS_ISA")
        return None, f"GLM_MS_ISA={wanted}: not an instruction set of this machine ({_SETS}); unset it"
    return library, None


@lru_cache(maxsize=1)
def _warn(why: str) -> None:
    warnings.warn(f"portable operators in place of C++ kernels: {why}", stacklevel=3)
