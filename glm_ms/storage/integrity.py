"""SHA-256 of files, and `manifest.json`, which has those of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.readers import read_object

MANIFEST = "manifest.json"
_CHECKSUM = "manifest_sha256"  # of all other keys
_CHUNK = 1 << 20


def write_manifest_values(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint folder, with a checksum of `values`, which are JSON."""
    text = json.dumps({**values, _CHECKSUM: json_sha256(values)}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest_values(folder: Path) -> dict[str, Any]:
    """The values of a manifest; raises CheckpointError if it is missing, cannot be read or is damaged."""
    path = folder / MANIFEST
    values = read_object(path, CheckpointError)
    if values.pop(_CHECKSUM, None) != json_sha256(values):
        raise CheckpointError(f"{path}: damaged: its content does not match its checksum")
    return values


def manifest_beside(path: Path) -> dict[str, Any] | None:
    """The values of the manifest in the folder `path`, or in that of the file `path`; None if there is none, or one of
    another program. Raises CheckpointError as `read_manifest_values`."""
    folder = path if path.is_dir() else path.parent
    # One damaged bit never hides both keys of a manifest of this project.
    own = {_CHECKSUM, "format_version"}
    if not (folder / MANIFEST).is_file() or not own & read_object(folder / MANIFEST, CheckpointError).keys():
        return None
    return read_manifest_values(folder)


def position_beside(path: Path) -> dict[str, Any]:
    """What the manifest beside weights says about their run; empty without one of this project."""
    position = (manifest_beside(path) or {}).get("position")
    return position if isinstance(position, dict) else {}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"bytes", "sha256"} of every file of a folder."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}


def check_file(path: Path, known: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a file is missing or differs from its {"bytes", "sha256"} of `describe_files`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size, written = path.stat().st_size, known["bytes"]
    if size != written:
        raise CheckpointError(f"{path}: has {size} bytes, {written} were written: truncated or of another checkpoint")
    if file_sha256(path) != known["sha256"]:
        raise CheckpointError(f"{path}: damaged or of another checkpoint: its SHA-256 differs from {MANIFEST}")


def check_listed(path: Path, added: bool = False) -> None:
    """Compares a file with the manifest beside it, if there is one. A `manifest.json` of another program is ignored.

    Args:
        added: allow a file that the manifest does not list.

    Raises:
        CheckpointError: the file or the manifest is damaged, or the file was added later.
    """
    manifest = manifest_beside(path)
    if manifest is None:
        return
    known = manifest["files"]
    if path.name in known:
        check_file(path, known[path.name])
    elif not added:
        raise CheckpointError(
            f"{path}: is not in {MANIFEST} beside it, so it was added later; remove it, or the manifest if the file "
            "is right"
        )


def check_all_listed(paths: Iterable[Path]) -> None:
    """`check_listed` for several files."""
    for path in paths:
        check_listed(path)


def json_sha256(values: Any) -> str:
    """SHA-256 of JSON values; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, which is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def differing_keys(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Keys that only one of two JSON objects has, or whose values differ."""
    return sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
