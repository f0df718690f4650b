"""Output that appears only when it is whole."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glm_ms.storage.errors import CheckpointError

_PARTIAL, _REPLACED = ".partial", ".replaced"


@contextmanager
def atomic_output(path: Path, *, folder: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Yields a hidden path beside `path` to write to, and renames it to `path` when the block ends well.

    When the block raises, what was written is removed. When the process is killed, it stays hidden under
    its temporary name and the next output to the same `path` removes it.

    Args:
        path: final file or folder.
        folder: the yielded path is an empty folder; else it does not exist and is to become a file.
        overwrite: replace what stands at `path`.

    Raises:
        CheckpointError: `path` exists without `overwrite`, or must not be replaced, or cannot be written.
    """
    check_target(path, folder=folder, overwrite=overwrite)
    final = path.resolve()
    token = secrets.token_hex(4)
    partial = final.with_name(f".{final.name}.{token}{_PARTIAL}")
    try:
        _remove_leftovers(final)
        # A lock and not the process id tells a living writer from a dead one: it also holds between
        # containers, and the kernel takes it back from a killed process.
        partial.mkdir()
        with _locked(partial):
            work = partial if folder else partial / final.name
            yield work
            _sync(work)
            _publish(work, final, final.with_name(f".{final.name}.{token}{_REPLACED}"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, *, folder: bool, overwrite: bool) -> None:
    """Raises `CheckpointError` when `atomic_output` would refuse to write to `path`."""
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder {path.parent} does not exist; create it first")
    if not path.exists():
        return
    if path.is_dir() != folder:
        kinds = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise CheckpointError(f"{path}: is {kinds[0]}, but {kinds[1]} is to be written; choose another name")
    if not overwrite:
        raise CheckpointError(f"{path}: exists already; choose another name or allow overwriting")
    if folder:
        _check_is_checkpoint_folder(path)


def _check_is_checkpoint_folder(folder: Path) -> None:
    """A slip in a path must not cost a folder of other things."""
    items = list(folder.iterdir())
    flat = all(item.is_file() for item in items)
    if items and not (flat and (folder / "config.json").is_file()):
        raise CheckpointError(
            f"{folder}: does not look like a checkpoint (config.json and files only) and is not replaced; "
            "choose another name or remove it yourself"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an advisory lock on a folder; file systems that have none go without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(final: Path) -> None:
    """Removes what killed processes left of earlier outputs to the same path."""
    for item in final.parent.iterdir():
        if not item.name.startswith(f".{final.name}."):
            continue
        # The set-aside old folder is worthless only once the new one stands.
        outdated = item.name.endswith(_REPLACED) and final.exists()
        if outdated or (item.name.endswith(_PARTIAL) and _is_abandoned(item)):
            shutil.rmtree(item, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _sync(work: Path) -> None:
    """Puts the bytes on the disk before the name, so that a power cut cannot leave the name alone."""
    for file in [work] if work.is_file() else sorted(work.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(work: Path, final: Path, aside: Path) -> None:
    if not final.is_dir():
        os.replace(work, final)
        return
    os.rename(final, aside)
    try:
        os.rename(work, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
