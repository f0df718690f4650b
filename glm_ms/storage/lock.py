"""Advisory file locks. The kernel releases a lock when its process ends, also after a kill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from glm_ms.storage.errors import CheckpointError, not_written


@contextmanager
def locked(path: Path, *, folder: bool = False, on_wait: Callable[[], None] | None = None) -> Iterator[OSError | None]:
    """Locks a file, which is created if missing, or an existing folder.

    If another process has the lock, calls `on_wait` once and waits; without `on_wait` raises BlockingIOError. Yields
    None, or the reason if the file system has no locks and `path` is therefore not locked.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    no_locks = None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            no_locks = error
        yield no_locks
    finally:
        os.close(descriptor)


@contextmanager
def run_lock(output_dir: Path, say: Callable[[str], None], mode: str = "") -> Iterator[None]:
    """Locks the output folder for training, or for the results of the run mode `mode`; warns through `say` if the file
    system has no locks, and continues.

    Raises:
        CheckpointError: another process writes the same files, or the lock cannot be made.
    """
    does = f"writes results of {mode}" if mode else "is training"
    with ExitStack() as stack:
        try:
            no_locks = stack.enter_context(locked(output_dir / (f".{mode}.lock" if mode else ".lock")))
        except BlockingIOError:
            raise CheckpointError(
                f"{output_dir}: another run {does} into this folder; wait for it, or give another --output_dir"
            ) from None
        except OSError as error:
            raise CheckpointError(not_written(output_dir, error)) from None
        if no_locks:
            say(
                f"{output_dir}: its file system has no locks ({no_locks.strerror or no_locks}); "
                "make sure that no second run writes into this folder"
            )
        yield
