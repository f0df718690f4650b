"""Work beside the main thread whose errors are asked for later."""

from __future__ import annotations

import threading
from typing import Callable


class Background:
    """Runs a function in a thread. The end of the process does not wait for it.

    The function is one that releases the interpreter's lock, such as SHA-256 of a file.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="glm_ms checks", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the function has returned; raises what it has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
