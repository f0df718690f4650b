"""The oneDNN that MindSpore brings along, as matrix products of the kernels. Imports no MindSpore."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from glm_ms.ops.cpu import library

# In the folder of MindSpore.
_FILES = "lib/libdnnl.so*"


@lru_cache(maxsize=1)
def has_blas() -> bool:
    """Whether there are kernels, and matrix products for them."""
    kernels, mindspore = library.load(), find_spec("mindspore")
    if kernels is None or mindspore is None or mindspore.origin is None:
        return False
    files = sorted(Path(mindspore.origin).parent.glob(_FILES))
    return any(kernels.glm_ms_open_blas(str(file).encode()) for file in files)


def has_native_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32 on this processor."""
    kernels = library.load()
    return kernels is not None and has_blas() and bool(kernels.glm_ms_native_bf16())
