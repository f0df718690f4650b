"""Processes that a test has caused, found by a variable of their environment."""

from __future__ import annotations

import os
from pathlib import Path


def environment_of(process: int) -> dict[str, str]:
    """The environment a process was started with; empty once it has ended."""
    try:
        entries = Path("/proc", str(process), "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode("utf-8", "replace").split("=", 1) for entry in entries if b"=" in entry)


def left_of(folder: Path) -> list[int]:
    """Processes that were started with OF_TEST=folder and are still there, other than this one."""
    processes = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and int(entry) != os.getpid()]
    return [process for process in processes if environment_of(process).get("OF_TEST") == str(folder)]
