"""SHA-256 of files, and `manifest.json`, which keeps those of a checkpoint beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError

MANIFEST = "manifest.json"
_CHECKSUM = "manifest_sha256"  # of all other keys
_CHUNK = 1 << 20


def write_manifest_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint.

    Args:
        folder: of the checkpoint.
        values: JSON; `files` among them is of `describe_files`.
    """
    text = json.dumps({**values, _CHECKSUM: json_sha256(values)}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest_values(folder: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, it cannot be read ({error})") from None
    if not isinstance(values, dict) or values.pop(_CHECKSUM, None) != json_sha256(values):
        raise CheckpointError(f"{path}: damaged, it is not what was written")
    return values


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"bytes", "sha256"} of every file of a folder, each read once."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }


def check_file(path: Path, known: Mapping[str, Any]) -> None:
    """Holds a file to its size and SHA-256.

    Args:
        path: of the file.
        known: its {"bytes", "sha256"}.

    Raises:
        CheckpointError: it is missing, cut short, damaged or that of another checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if size != known["bytes"]:
        raise CheckpointError(
            f"{path}: has {size} bytes, {known['bytes']} were written: cut short or foreign"
        )
    if file_sha256(path) != known["sha256"]:
        raise CheckpointError(f"{path}: damaged or foreign: its SHA-256 is not the one in {MANIFEST}")


def json_sha256(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def differing_keys(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Keys that two JSON objects do not share, or whose values differ."""
    return sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
