"""The table of layouts: its arithmetic, and with the rig a small one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RIG = Path(os.environ.get("GLM_MS_SHARED", REPOSITORY.parent / "shared")) / "rig" / "run.sh"
TOOL = REPOSITORY / "tools" / "parallel_table.py"


@pytest.mark.slow
@pytest.mark.skipif(not RIG.is_file() or shutil.which("gcc") is None, reason=f"needs gcc and the rig ({RIG})")
def test_bytes_of_the_whole_network() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--rig", str(RIG)], capture_output=True, text=True, timeout=900,
        check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split(" | ")[:2]): line for line in done.stdout.splitlines()[2:]}
    assert len(rows) == 6
    # 28 blocks of 203,960,832 parameters, embedding and output layer of 266,338,304 each, the last norm of 4096.
    assert "23.26 GiB | 93.04 GiB" in rows["| 8 x 1 x 1", "whole"]
    assert "2.91 GiB | 11.63 GiB" in rows["| 8 x 1 x 1", "split"]
    assert "| 65024 x 4096 | 1024 x 4096 | 256 x 4096 | 3424 x 4096 |" in rows["| 2 x 4 x 1", "whole"]


def test_a_rig_is_needed() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--rig" in done.stderr
