"""Without a C++ compiler the package installs, with the sources of the kernels and without their library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from glm_ms.ops.cpu import build

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = (
    "glm_ms", "configs", "tools", "run_glm.py", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project without a library."""
    pytest.importorskip("wheel", reason="pip builds no wheel without the package wheel")
    for name in FILES:
        source = REPOSITORY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", build.LIBRARY)
            shutil.copytree(source, tmp_path / "project" / name, ignore=ignored)
        else:
            shutil.copy2(source, tmp_path / "project" / name)
    return tmp_path / "project"


def wheel(checkout: Path, **environment: str) -> set[str]:
    """Files in the wheel below glm_ms/ops/cpu."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "wheels"]
    done = subprocess.run(
        command,
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (checkout / "wheels").iterdir()
    prefix = "glm_ms/ops/cpu/"
    return {name[len(prefix) :] for name in zipfile.ZipFile(file).namelist() if name.startswith(prefix)}


@pytest.mark.slow
def test_without_a_compiler(checkout: Path):
    files = wheel(checkout, CXX="no-such-compiler")
    assert build.LIBRARY not in files
    assert {f"src/{path.name}" for path in build.SOURCES.iterdir()} <= files
