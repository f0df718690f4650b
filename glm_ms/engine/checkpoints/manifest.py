"""`manifest.json` of a training checkpoint: its run, its step, and the SHA-256 of every file in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mindspore

from glm_ms.peft import is_adapter_folder
from glm_ms.storage import integrity
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.fingerprint import is_weight_file
from glm_ms.storage.integrity import MANIFEST
from glm_ms.version import __version__

FORMAT_VERSION = 1
NO_FILES = hashlib.sha256().hexdigest()  # the fingerprint of no weights
_EARLIER_FORMAT = "state.json"


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        step: updates (and skipped updates) made.
        epoch, row: the next row in the order of training: pass over the data and place in its order.
        position: what a resumed run must share, see `position_state` in `glm_ms.engine.checkpoints.resume`.
        best: the record of `BestEvaluation` in `glm_ms.engine.checkpoints.checkpoints`; None without one.
        files: name -> {"bytes", "sha256"} of every other file.
        config_sha256: of `position`.
        format_version, glm_ms, mindspore: versions of the layout and of the programs.
    """

    step: int
    epoch: int
    row: int
    position: dict[str, Any]
    best: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    device: str
    config_sha256: str = ""
    format_version: int = FORMAT_VERSION
    glm_ms: str = __version__
    mindspore: str = mindspore.__version__


def write_manifest(
    folder: Path, step: int, place: tuple[int, int], position: dict[str, Any], best: dict[str, Any] | None, device: str
) -> None:
    """Reads every file of a checkpoint once and writes the manifest beside them.

    `place` is (`epoch`, `row`) of `Manifest`, which explains the other values too.
    """
    files, config_sha256 = integrity.describe_files(folder), integrity.json_sha256(position)
    manifest = Manifest(step, *place, position, best, files, device, config_sha256)
    integrity.write_manifest_values(folder, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing, damaged, or of another layout."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(_why_no_manifest(folder))
    values = integrity.read_manifest_values(folder)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: layout {values.get('format_version')}, this version of glm_ms ({__version__}) reads layout "
            f"{FORMAT_VERSION}; resume with the version that wrote it, {values.get('glm_ms')}"
        )
    return Manifest(**values)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Checks size and SHA-256 of every file of a checkpoint, reading each once; raises CheckpointError."""
    for name, known in manifest.files.items():
        integrity.check_file(folder / name, known)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old then, new now` for every key of `now` whose value has changed; nested keys are dotted."""
    found = []
    for key, value in now.items():
        before = then.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            found += differences(before, value, f"{prefix}{key}.")
        elif before != value:
            old, new = ("null" if one is None else one for one in (before, value))
            found.append(f"{prefix}{key}: {old} then, {new} now")
    return found


def weights_flag(folder: Path) -> str:
    """The flag that starts a new run from a checkpoint."""
    return "--load_adapter" if is_adapter_folder(folder) else "--load_checkpoint"


def _why_no_manifest(folder: Path) -> str:
    start = f"start a new run from its weights with {weights_flag(folder)} {folder}"
    if (folder / _EARLIER_FORMAT).is_file():
        return (
            f"{folder}: written by an earlier version of glm_ms ({_EARLIER_FORMAT} in place of {MANIFEST}), which "
            f"cannot be resumed; {start}"
        )
    if folder.is_file() or any(is_weight_file(path) for path in folder.iterdir()):
        return f"{folder}: not a training checkpoint, only weights (no {MANIFEST}); {start}"
    return (
        f"{folder}: not a training checkpoint ({MANIFEST} is missing); a run resumes from a folder such as "
        "OUTPUT_DIR/checkpoint/step_00000100"
    )
