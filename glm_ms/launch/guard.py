"""Ends the ranks of a launcher that was killed; otherwise they would continue and keep their cards. Linux only.

The guard is a process in its own session. It waits for the end of a pipe whose other end only the launcher has open,
then kills every process whose environment has the launcher's mark, whatever its parent is by then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "GLM_MS_LAUNCH"  # of all processes of one launcher
_SECONDS = 60.0  # a process in a call of a device driver may need this long to end
_PAUSE = 0.05


class Guard:
    """Watches this process until `dismiss`; `environment`, with the mark of the job, is for its processes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        token = secrets.token_hex(8)
        self.environment = {**environment, MARK: token}
        reading, self._writing = os.pipe()
        # Without a mark: neither this guard nor that of an outer launcher must kill it.
        own = {name: value for name, value in environment.items() if name != MARK}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(reading), token],
                env=own, pass_fds=[reading], cwd="/", start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )  # fmt: skip
        except OSError:
            os.close(self._writing)
            raise
        finally:
            os.close(reading)

    def dismiss(self) -> None:
        """Ends the guard, not the processes of the job."""
        self._process.kill()
        self._process.wait()
        os.close(self._writing)


def marked(token: str) -> list[int]:
    """Running processes of this user with a mark, except this one."""
    found = []
    for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            variables = Path("/proc", str(process), "environ").read_bytes().split(b"\0")
            if f"{MARK}={token}".encode() in variables and process != os.getpid():
                found.append(process)
    return found


def keep_watch(descriptor: int, token: str) -> None:
    """Waits for the end of the pipe, then kills all marked processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the end of the pipe counts
    while os.read(descriptor, 64):
        pass
    deadline = time.monotonic() + _SECONDS
    while (left := marked(token)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    keep_watch(int(sys.argv[1]), sys.argv[2])
