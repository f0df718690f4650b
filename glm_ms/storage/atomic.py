"""Files and folders that appear, or replace older ones, only when they are complete."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glm_ms.spelling import given
from glm_ms.storage.errors import CheckpointError, FileError, WriteError, not_written
from glm_ms.storage.lock import locked
from glm_ms.storage.paths import path_problem

_PARTIAL, _REPLACED = ".partial", ".replaced"


@contextmanager
def atomic_output(
    path: Path, *, folder: bool = False, overwrite: bool = False, parents: bool = False
) -> Iterator[Path]:
    """As `staged`, for checkpoints: never replaces a folder of other things.

    Raises:
        CheckpointError: `path` exists without `overwrite`, or must not be replaced, or cannot be written.
    """
    check_target(path, folder=folder, overwrite=overwrite)
    try:
        with staged(path, folder=folder, parents=parents) as work:
            yield work
    except WriteError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def staged(path: Path, *, folder: bool = False, parents: bool = False) -> Iterator[Path]:
    """Yields a hidden path beside `path` to write to; syncs it and renames it to `path` when the block succeeds.

    With `folder` the hidden path is an empty folder, else it does not exist and must become a file. If the block
    raises, its output is removed. If the process is killed, the output stays under its hidden name and the next output
    to the same `path` removes it. With `parents` missing folders are made. Raises WriteError if `path` cannot be
    written.
    """
    final = path.resolve()
    token = secrets.token_hex(8)
    partial = final.with_name(f".{final.name}.{token}{_PARTIAL}")
    try:
        if parents:
            final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent, final.name)
        # A lock, not a process id, shows that the writer is alive: it works across containers too.
        partial.mkdir(0o777 if folder else 0o700)
        with locked(partial, folder=True):
            work = partial if folder else partial / final.name
            yield work
            _sync(work)
            _publish(work, final, final.with_name(f".{final.name}.{token}{_REPLACED}"))
    except OSError as error:
        raise WriteError(not_written(path, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_bytes(path: Path, content: bytes, *, parents: bool = False) -> None:
    """Writes a small file, whole or not at all; `parents` and errors as of `staged`."""
    with staged(path, parents=parents) as work:
        work.write_bytes(content)


def replace_text(path: Path, text: str, *, parents: bool = False) -> None:
    """As `replace_bytes`, for UTF-8 text; line ends stay as in `text`."""
    replace_bytes(path, text.encode("utf-8"), parents=parents)


def sync(path: Path) -> None:
    """Writes the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(
    path: str | Path, *, overwrite: bool, folder: bool = False, error: type[FileError] = CheckpointError
) -> None:
    """Checks, before long work, that `atomic_output` accepts a path.

    Raises:
        error: `path` is below a file, is of the other kind, or must not be replaced. Missing folders are made later.
    """
    if problem := path_problem(str(path)):
        raise error(problem)
    path = Path(path)
    if os.path.islink(os.path.realpath(path)):
        raise error(f"{path}: is a symbolic link to itself; remove it, or choose another name")
    blocked = next((item for item in path.absolute().parents if item.exists() and not item.is_dir()), None)
    if blocked is not None:
        raise error(f"{path}: {blocked} is a file, not a folder; choose another name")
    if not path.exists():
        return
    if path.is_dir() != folder:
        kinds = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise error(f"{path}: is {kinds[0]}, but {kinds[1]} is to be written; choose another name")
    if not overwrite:
        raise error(f"{path}: exists already; choose another name, or add {given('overwrite')}")
    items = list(path.iterdir()) if folder else []
    # A typing error in a path must not delete a folder of other files.
    if items and not ((path / "config.json").is_file() and all(item.is_file() for item in items)):
        raise error(
            f"{path}: does not look like a checkpoint (config.json and files only) and is not replaced; "
            "choose another name or remove it yourself"
        )


def remove_folder(path: Path) -> None:
    """Removes a folder of outputs; a process killed meanwhile never leaves half of it under its name."""
    doomed = path.rename(path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PARTIAL}"))
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left in a folder of outputs with this name, `*` for any.

    A folder that was set aside, and whose new version never came, gets its name back: it is the only copy.
    """
    for item in folder.glob(f".{'*' if name == '*' else glob.escape(name)}.*"):
        final = item.stem[1:].rpartition(".")[0]
        if (name != "*" and final != name) or not final or item.suffix not in (_PARTIAL, _REPLACED):
            continue
        if item.suffix == _PARTIAL:
            abandoned = _is_abandoned(item)
        else:
            partial = item.with_suffix(_PARTIAL)
            abandoned = not partial.exists() or _is_abandoned(partial)
            if abandoned and not (folder / final).exists():
                with suppress(OSError):  # another process may have done the same
                    item.rename(folder / final)
                continue
        if abandoned:
            shutil.rmtree(item, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    try:
        with locked(partial, folder=True) as no_locks:
            return no_locks is None
    except OSError:
        return False


def _sync(work: Path) -> None:
    """Writes the content to the disk before the rename, so that a power cut cannot leave an empty file."""
    for path in sorted([work, *work.rglob("*")], reverse=True):  # contents before their folders
        sync(path)


def _publish(work: Path, final: Path, aside: Path) -> None:
    if work.is_file() or not final.is_dir():
        os.replace(work, final)
        return
    os.rename(final, aside)
    try:
        os.rename(work, final)
    except OSError:
        os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
