"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glm_ms.storage.errors import CheckpointError


@contextmanager
def run_lock(output_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder of a run; the kernel lets go when the process ends, however it ends.

    Args:
        output_dir: folder of the run.
        say: hears of it where the file system has no locks; the run then goes on without.

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
        except OSError as error:
            say(
                f"{output_dir}: its file system has no locks ({error.strerror or error}): see to it yourself that no "
                "second run trains into this folder"
            )
        yield
