"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm_ms.convert import CheckpointError


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Holds the folder of a run; the kernel lets go when the process ends, however it ends.

    Raises:
        CheckpointError: another process is training into the folder.
    """
    with (output_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{output_dir}: another run is training into this folder; wait for it, or give another --output_dir"
            ) from None
        except OSError:
            pass  # a file system without locks goes without
        yield
