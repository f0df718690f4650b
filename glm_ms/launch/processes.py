"""Processes of this machine: parents, environments, ends; and names that only one process may hold. Linux only."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
# What msrun and other launchers tell their processes; of no use to the processes of another job.
JOB_VARIABLES = (
    "MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_SERVER_NUM", "MS_NODE_ID", "MS_TOPO_TIMEOUT",
    "RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "DEVICE_ID", "DEVICE_NUM",
)  # fmt: skip


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends, so that it learns how they end.

    Raises:
        OSError: the system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _children() -> dict[int, list[int]]:
    """Process -> its children, of all processes of the machine; those that have ended and that nobody has waited
    for are among them."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        # The name, in parentheses, may hold anything.
        parent = int(stat.rpartition(")")[2].split()[1])
        found.setdefault(parent, []).append(int(entry))
    return found


def descendants(process: int) -> list[int]:
    """Children of a process, their children, and so on."""
    family = _children()
    found, waiting = [], list(family.get(process, ()))
    while waiting:
        child = waiting.pop()
        found.append(child)
        waiting += family.get(child, ())
    return found


def send(process: int, number: int) -> None:
    """Sends a signal to a process, and to the group that it leads."""
    try:
        if os.getpgid(process) == process:
            os.killpg(process, number)
        else:
            os.kill(process, number)
    except ProcessLookupError:
        pass
    except PermissionError:  # a group whose members have all ended
        pass


def kill_descendants(seconds: float = 10) -> list[int]:
    """SIGKILL to all descendants of this process, until there are none.

    Returns:
        Those that are there still after that time (a process in a call of a device driver cannot be ended).
    """
    deadline = time.monotonic() + seconds
    while True:
        left = descendants(os.getpid())
        for process in left:
            send(process, signal.SIGKILL)
        while left:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


class Interrupts:
    """Notes SIGINT, SIGTERM and SIGHUP instead of ending the process. One that is ignored (nohup) stays so.

    Attributes:
        received: number of the first signal; 0 before.
        count: how many there were.
    """

    def __init__(self) -> None:
        self.received = self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        self.count += 1


def claim(what: str) -> socket.socket | None:
    """Takes a name that only one process of this machine can hold; it is free again when that one ends.

    Returns:
        An object to keep; None when another process holds the name.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()
    try:
        holder.bind(f"\0glm_ms.{name}")
    except OSError:
        holder.close()
        return None
    return holder


def clean_environment(say: Callable[[str], None]) -> dict[str, str]:
    """The environment without what an outer job tells its processes, and with this interpreter's programs first:
    msrun starts the `python` of PATH."""
    dropped = [name for name in JOB_VARIABLES if name in os.environ]
    if dropped:
        say(f"note: not passed on, as each rank gets its own: {', '.join(dropped)}")
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    programs = str(Path(sys.executable).absolute().parent)
    environment["PATH"] = os.pathsep.join([programs, *filter(None, [os.environ.get("PATH")])])
    # What a rank says is to be seen when it says it.
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment
