"""Advisory file locks. The kernel releases a lock when its process ends, also after a kill."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from glm_ms.storage.errors import CheckpointError


@contextmanager
def locked(path: Path, *, folder: bool = False, on_wait: Callable[[], None] | None = None) -> Iterator[OSError | None]:
    """Locks a file, which is created if missing, or an existing folder.

    Args:
        path: file or folder.
        folder: `path` is a folder.
        on_wait: called once if another process has the lock; then waits for it.

    Yields:
        None; the reason if the file system has no locks and `path` is therefore not locked.

    Raises:
        BlockingIOError: another process has the lock and `on_wait` is None.
        OSError: `path` cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(descriptor, on_wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, on_wait: Callable[[], None] | None) -> OSError | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is None:
            raise
        on_wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        return error
    return None


@contextmanager
def run_lock(output_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks the output folder of a run.

    Args:
        output_dir: folder of the run.
        say: receives a warning if the file system has no locks; the run continues without.

    Raises:
        CheckpointError: another process is training into the folder.
    """
    with ExitStack() as stack:
        try:
            no_locks = stack.enter_context(locked(output_dir / ".lock"))
        except BlockingIOError:
            raise CheckpointError(
                f"{output_dir}: another run is training into this folder; wait for it, or give another --output_dir"
            ) from None
        if no_locks:
            say(
                f"{output_dir}: its file system has no locks ({no_locks.strerror or no_locks}); "
                "make sure that no second run trains into this folder"
            )
        yield
