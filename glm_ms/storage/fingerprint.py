"""Identifies weights by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.run_folder import OPTIMIZER, WEIGHT_ENDINGS

# Of a file above this size only some blocks are read.
_WHOLE, _BLOCKS, _BLOCK = 1 << 26, 64, 1 << 16


def weights_fingerprint(path: Path) -> str:
    """Identifies weights by their content, in seconds even for a 6B network.

    SHA-256 over names, sizes and contents of the weight files; of a file above 64 MB only 64 blocks of 64 KiB are read,
    spread evenly from its first to its last byte. Training changes every weight, so weights of another training differ
    in every block. `path` is a file, or a folder with weight files, as MindFormers also in folders rank_N.
    """
    files = [path] if path.is_file() else [item for item in sorted(path.iterdir()) if is_weight_file(item)]
    files = files or [item for item in sorted(path.glob("rank_*/*")) if is_weight_file(item)]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = file.name if path.is_dir() else "weights"
        digest.update(f"{name}:{size}:".encode())
        if size <= _WHOLE:
            digest.update(file_sha256(file).encode())
            continue
        with file.open("rb") as opened:
            for number in range(_BLOCKS):
                opened.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()


def is_weight_file(path: Path) -> bool:
    """Whether a file has weights, and not the state of an optimizer."""
    return path.suffix in WEIGHT_ENDINGS and path.name != OPTIMIZER
