"""Log files of ranks: follows them while they grow, and finds the reason of a failure."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

_TRACEBACK = "Traceback (most recent call last):"
# Lines between chained tracebacks (PEP 3134; texts of the traceback module).
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
# Tracebacks under these lines are not the reason why a program ends.
_AFTERMATH = ("Exception ignored in", "Error in atexit", "Exception ignored while")
# Lines of MindSpore's own log: "[WARNING] DISTRIBUTED(123,7f..,python):2026-01-01-..."
_MINDSPORE = re.compile(r"^\[(?P<level>DEBUG|INFO|TRACE|WARNING|ERROR|CRITICAL|MS_\w+)\] ?\w*\(")
_CPP_STACK = "- C++ Call Stack: (For framework developers)"
_RULER = re.compile(r"^-{20,}$")
_MOST_LINES, _LAST_LINES = 80, 20
_TAIL_BYTES = 1 << 20


class LogWatch:
    """Reads a log file, which may be missing at first, while it grows; `show` receives new bytes."""

    def __init__(self, path: Path, show: Callable[[bytes], None] | None = None) -> None:
        self.traceback_time: float | None = None  # of the last traceback, approximately, as `time.monotonic()`
        self._path, self._show = path, show
        self._file: BinaryIO | None = None
        self._since = time.monotonic()
        self._end = b""  # of the bytes read: a marker may come in two pieces

    def update(self) -> None:
        """Reads the new bytes."""
        if self._file is None:
            try:
                self._file = self._path.open("rb", buffering=0)  # once: a later job may rename the file
            except FileNotFoundError:
                return
        marker = _TRACEBACK.encode()
        while piece := self._file.read(1 << 16):
            seen = self._end + piece
            self._end = seen[-len(marker) + 1 :]
            if marker in seen:
                # It may be older than this call. Usually a process writes nothing after its traceback. The clock of
                # the machine may have been set meanwhile.
                silent = time.time() - os.fstat(self._file.fileno()).st_mtime
                now = time.monotonic()
                self.traceback_time = now - min(max(silent, 0.0), now - self._since)
            if self._show is not None:
                self._show(piece)

    def text(self) -> str:
        """The last megabyte of the log."""
        self.update()
        if self._file is None:
            return ""
        size = os.fstat(self._file.fileno()).st_size
        start = max(0, size - _TAIL_BYTES)
        return os.pread(self._file.fileno(), size - start, start).decode("utf-8", errors="replace")


def reason_in(text: str) -> str:
    """Why a process failed, from its log: the last traceback with those chained to it, or the last lines.

    Omits lines of MindSpore's log, its C++ call stack, and tracebacks that are not the reason why the program ended.
    At most 80 lines; empty if nothing is left.
    """
    lines = _as_seen(text)
    found = _last_traceback(lines)
    if found is None:
        kept = [line for line in lines if not _is_noise(line, but=("ERROR", "CRITICAL"))]
        return "\n".join(kept[-_LAST_LINES:]).strip("\n")
    start, end = found
    block = [line for line in lines[start:end] if not _is_noise(line)]
    if _CPP_STACK in block:
        block = block[: block.index(_CPP_STACK)]
    while block and (_RULER.match(block[-1]) or not block[-1].strip()):
        block.pop()
    if len(block) > _MOST_LINES:
        half = _MOST_LINES // 2
        block[half:-half] = [f"... {len(block) - _MOST_LINES} lines left out, see the log ..."]
    return "\n".join(block).strip("\n")


def ends_with_traceback(text: str) -> bool:
    """Whether a log has only lines of MindSpore after its last traceback: then the process is ending."""
    lines = _as_seen(text)
    found = _last_traceback(lines)
    if found is None or found[1] < len(lines):
        return False
    last = max(number for number, line in enumerate(lines) if line.endswith(_TRACEBACK))
    after = itertools.dropwhile(lambda line: line.startswith(" ") or _is_noise(line), lines[last + 1 :])
    next(after, None)  # the line that names the exception
    for line in itertools.takewhile(lambda line: line != _CPP_STACK, after):
        if line.strip() and not _RULER.match(line) and not _is_noise(line):
            return False
    return True


def _as_seen(text: str) -> list[str]:
    """Lines as a terminal shows them: a progress bar is a line with its last state."""
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]


def _is_noise(line: str, but: Iterable[str] = ()) -> bool:
    match = _MINDSPORE.match(line)
    return match is not None and match["level"] not in but


def _last_traceback(lines: list[str]) -> tuple[int, int] | None:
    """First line of the last chain of tracebacks, and the line at which tracebacks begin that are not the reason."""
    starts = [number for number, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    end = len(lines)
    while starts:
        start = starts.pop()
        while starts and any(line.strip() in _CHAINED for line in lines[max(starts[-1], start - 3) : start]):
            start = starts.pop()
        before = lines[start - 1] if start else ""
        if not before.startswith(_AFTERMATH):
            return start, end
        end = start - 1
    return None
