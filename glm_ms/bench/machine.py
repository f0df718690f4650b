"""The machine of a measurement: cores, instruction sets, how fast memory is read, what else runs."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# Instruction sets of /proc/cpuinfo that kernels of neural networks use.
_INTERESTING = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_READ_BYTES = 1 << 30
_REPEATS = 5


def cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def describe() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory in bytes, system."""
    info = _colon_lines("/proc/cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(cores()),
        "instruction_sets": [name for name in _INTERESTING if name in flags],
        "memory_bytes": _meminfo("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def available_memory() -> int | None:
    """Bytes that programs can still take; None if the system does not tell."""
    return _meminfo("MemAvailable")


def read_bandwidth(threads: int, size: int = _READ_BYTES) -> dict[str, float]:
    """Bytes a second of a plain read with all threads: best and median of five passes over a buffer of `size` bytes.

    Each thread searches its part for a byte that is not there, with the C library, which reads with the widest vectors
    of the processor and keeps nothing.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.restype, memchr.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    buffer = np.full(size, 1, np.uint8)  # pages of zeros would all be one page
    part, base = size // threads, buffer.ctypes.data

    def read(number: int) -> int | None:
        return memchr(base + number * part, 2, part)

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
        for _ in range(_REPEATS):
            start = time.perf_counter()
            found = list(pool.map(read, range(threads)))
            rates.append(part * threads / (time.perf_counter() - start))
            assert not any(found)
    return {"best": max(rates), "median": statistics.median(rates)}


class Load:
    """The share of all cores that other programs take, from /proc/stat; own processes are those of `pids`."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pids = [os.getpid(), *pids]
        self.start = self._now()

    def foreign(self) -> float | None:
        """Cores that others have used since the start, as a share of all cores; None if the system does not tell."""
        now = self._now()
        if now is None or self.start is None:
            return None
        (clock, busy, own, count), (clock0, busy0, own0, _) = now, self.start
        seconds = (clock - clock0) * count
        return min(1.0, max(0.0, (busy - busy0 - (own - own0)) / seconds)) if seconds > 0 else None

    def _now(self) -> tuple[float, float, float, int] | None:
        """Clock, busy seconds of all cores, those of own processes, number of cores."""
        try:
            lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, *rest = map(int, lines[0].split()[1:9])  # without idle and waiting for disks
        count = sum(line.startswith("cpu") for line in lines) - 1
        busy = (user + nice + system + sum(rest)) / tick
        return time.monotonic(), busy, sum(map(cpu_seconds, self.pids)), count


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, with that of its ended children; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _meminfo(key: str) -> int | None:
    text = _colon_lines("/proc/meminfo").get(key)
    return None if text is None else int(text.split()[0]) * 1024


def _colon_lines(path: str) -> dict[str, str]:
    """`key: value` lines, the first of each key."""
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
