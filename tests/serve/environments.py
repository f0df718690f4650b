"""Interpreters with packages that are too large for the environment of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SECONDS = 900


def python_with(packages: Sequence[str], variable: str, folder: Path) -> str:
    """The interpreter that an environment variable names; without it one in a new environment in `folder`.

    Skips the test if the packages cannot be installed.
    """
    given = os.environ.get(variable)
    if given:
        return given
    python = str(folder / "bin" / "python")
    run_or_skip([sys.executable, "-m", "venv", str(folder)], "no virtual environment can be made")
    run_or_skip([python, "-m", "pip", "install", "-q", *packages], f"not installed: {', '.join(packages)}")
    return python


def run_or_skip(command: Sequence[str], reason: str, **options: Any) -> None:
    """Runs a command that needs what a machine may lack, such as the network."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **options)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{reason}: not within {SECONDS} s")
    if done.returncode:
        pytest.skip(f"{reason}: {done.stderr.strip()[-200:]}")
