"""Ends the ranks of a launcher that cannot do it any more, as after SIGKILL: they would go on and keep their cards.

The guard is a small process in a session of its own. It waits for the end of a pipe that the launcher alone holds,
then ends every process whose environment has the launcher's mark, whoever their parent is by then. Linux only.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "GLM_MS_LAUNCH"  # of all processes of one launcher
_SECONDS = 60.0  # a process in a call of a device driver may take that long to end
_PAUSE = 0.05


class Guard:
    """Watches this process from its making to `dismiss`.

    Args:
        environment: for the processes of the job; theirs is `self.environment`.

    Attributes:
        environment: the same, with the mark that the guard knows them by.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        token = secrets.token_hex(8)
        self.environment = {**environment, MARK: token}
        reading, self._writing = os.pipe()
        # Without a mark, so that neither this guard nor that of an outer launcher takes it for a rank.
        own = {name: value for name, value in environment.items() if name != MARK}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(reading), token],
                env=own, pass_fds=[reading], cwd="/", start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)

    def dismiss(self) -> None:
        """Ends the guard alone; the processes of the job are left as they are."""
        self._process.kill()
        self._process.wait()
        os.close(self._writing)


def marked(token: str) -> list[int]:
    """Processes of this user with a mark, but for this one; those that have ended have no environment."""
    wanted, found = f"{MARK}={token}".encode(), []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            variables = Path("/proc", entry, "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if wanted in variables:
            found.append(int(entry))
    return found


def keep_watch(descriptor: int, token: str) -> None:
    """Waits for the end of the pipe, then ends all marked processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the launcher
    while os.read(descriptor, 64):
        pass
    deadline = time.monotonic() + _SECONDS
    while (left := marked(token)) and time.monotonic() < deadline:
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_PAUSE)


if __name__ == "__main__":
    keep_watch(int(sys.argv[1]), sys.argv[2])
