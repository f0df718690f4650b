"""Processes, addresses and ports of this machine. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_CARD = re.compile(r"davinci(\d+)")


def ascend_cards(dev: str | Path = "/dev") -> list[str]:
    """Ascend cards of this machine or container by device file: `["davinci0", ...]`."""
    names = os.listdir(dev) if Path(dev).is_dir() else []
    return sorted(filter(_CARD.fullmatch, names), key=lambda name: int(name[len("davinci") :]))


def usable_cores() -> int:
    """Cores this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def adopt_orphans() -> None:
    """Makes this process the parent of orphaned descendants, so that it receives their exit statuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants() -> list[int]:
    """Children of this process, their children, and so on, zombies included."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
            # The name of the program, in parentheses, may contain spaces and parentheses.
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found = children.get(os.getpid(), [])
    for child in found:  # which grows meanwhile
        found += children.get(child, ())
    return found


def send(process: int, number: int) -> None:
    """Sends a signal to a process and, if it leads a process group, to the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: a group of zombies
        if os.getpgid(process) == process:
            os.killpg(process, number)
        else:
            os.kill(process, number)


def reap() -> Iterator[tuple[int, int]]:
    """Collects the children that have ended: process, exit status (of a signal: negative)."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        yield process, os.waitstatus_to_exitcode(status)


def kill_descendants(seconds: float = 10) -> list[int]:
    """Sends SIGKILL to all descendants of this process until none is left.

    Returns those left after `seconds`; a process in a call of a device driver cannot be killed.
    """
    deadline = time.monotonic() + seconds
    while left := descendants():
        for process in left:
            send(process, signal.SIGKILL)
        for _ in reap():
            pass
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return left


class Interrupts:
    """Records SIGINT, SIGTERM and SIGHUP; the process continues. An ignored signal (nohup) stays ignored.

    `received` is the number of the first signal, 0 before; `count` is how many were received.
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
    """Claims a name on this machine for as long as the returned object is open; None if another process has it."""
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()
    try:
        holder.bind(f"\0glm_ms.{name}")
    except OSError:
        holder.close()
        return None
    return holder


def claim_port(port: int) -> socket.socket | None:
    """Claims a TCP port, as `claim`, that no program of this machine listens on."""
    holder = claim(f"port {port}")
    if holder is None:
        return None
    with socket.socket() as probe:
        # As the scheduler does: lingering connections of an earlier job do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            holder.close()
            return None
    return holder


def is_local(address: str) -> bool:
    """Whether this machine has an IP address; False for names."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
            return True
        except OSError:
            return False
