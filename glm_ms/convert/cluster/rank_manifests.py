"""The manifests that lie beside the slices of a sharded run: are all of one run, and is every file as it was written?

Checkpoints of other programs have none; nothing can be said of them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import MANIFEST, check_file, differing_keys, read_manifest_values

KnownFiles = Mapping[Path, Mapping[str, Any]]


def read_rank_manifests(folders: Iterable[Path]) -> KnownFiles:
    """Reads the manifests of all ranks and compares what they belong to.

    Args:
        folders: of the ranks' files.

    Returns:
        File -> {"bytes", "sha256"} when it was written.

    Raises:
        CheckpointError: a manifest is damaged, or tells of another run or step than the first one.
    """
    known: dict[Path, Mapping[str, Any]] = {}
    first: tuple[Path, dict[str, Any]] | None = None
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            continue
        values = read_manifest_values(folder)
        belongs = {"step": values.get("step"), **(values.get("position") or {})}
        first = first or (folder, belongs)
        keys = differing_keys(first[1], belongs)
        if keys:
            raise CheckpointError(
                f"{folder / MANIFEST}: differs from {first[0] / MANIFEST} in {', '.join(keys)}; the slices are of "
                "different runs"
            )
        known.update((folder / name, of_file) for name, of_file in values["files"].items())
    return known


def check_rank_file(path: Path, known: KnownFiles) -> None:
    """Holds a file to the manifest beside it, where there is one.

    Raises:
        CheckpointError: it is damaged, or was put there later.
    """
    if path in known:
        check_file(path, known[path])
    elif (path.parent / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: is not in {MANIFEST} beside it, so it was put there later; remove it, or the manifest where "
            "you know better"
        )
