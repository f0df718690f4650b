"""Checks a device: its results are compared with those of the portable operators and of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mindspore as ms

from glm_ms.ascend_hints import host_log_folder, overflow_mode_note
from glm_ms.kernels.cases import REAL, SMALL
from glm_ms.ops.ascend import cann_version, soc_version
from glm_ms.ops.cpu import library
from glm_ms.ops.registry import device, why_portable
from glm_ms.selfcheck.golden import MODEL, golden_rows
from glm_ms.selfcheck.kernels import fused_rows, portable_rows
from glm_ms.selfcheck.rows import Row, head_lines, row_lines

# Device -> types in which its kernels are checked; float32 on others.
_TYPES = {"Ascend": ("float16", "bfloat16")}


def set_device(device_target: str, device_id: int) -> None:
    """Opens the device, for compiled graphs; MindSpore raises RuntimeError or ValueError if it cannot be opened."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(device_target, None if device_target == "CPU" else device_id)


def run_checks(golden: Path | None, say: Callable[[str], None]) -> bool:
    """Runs every check that the current device allows, prints a table as it grows, returns whether all passed.

    `golden` is tests/golden of the repository. Without its numbers those checks are left out, and a line says so.
    """
    if golden is not None and not (golden / "models" / MODEL / "golden.npz").is_file():
        golden = None
    for line in (*_device_lines(), *head_lines()):
        say(line)
    failed = total = 0
    for row in _rows(golden):
        total += 1
        failed += not row.passed
        for line in row_lines(row):
            say(line)
    if golden is None:
        say(
            "training and generation were not checked: the reference numbers (tests/golden) are missing; run this tool "
            "in a checkout of the repository"
        )
    say(f"{total - failed} of {total} passed" + (f", {failed} FAILED" if failed else ""))
    return not failed


def _rows(golden: Path | None) -> Iterator[Row]:
    fused = why_portable() is None
    yield from portable_rows(SMALL)
    if fused:
        for dtype in _TYPES.get(device(), ("float32",)):
            for sizes in (SMALL, REAL):
                yield from fused_rows(sizes, dtype)
    if golden is None:
        return
    yield from golden_rows(golden, "float32", fused=False)
    if fused:
        yield from golden_rows(golden, "float32", fused=True)
        yield from golden_rows(golden, "float16", fused=True)


def _device_lines() -> Iterator[str]:
    target, soc = ms.get_context("device_target"), soc_version()
    name = f"Ascend card {ms.get_context('device_id')} ({soc})" if soc else target
    cann = f", CANN {cann_version()}" if soc else ""
    yield f"device: {name}, MindSpore {ms.__version__}{cann}"
    if target == "CPU":
        yield f"C++ kernels: {library.description()}"
    if soc:
        yield f"host logs: {host_log_folder()}"
    note = overflow_mode_note(soc)
    if note is not None:
        yield f"note: {note}"
    reason = why_portable()
    if reason is None:
        yield "float32 rows of operators: portable ones against NumPy; others: fused kernels against portable operators"
    else:
        yield f"Fused kernels are NOT run: {reason}. The portable operators are compared with NumPy in float64."
