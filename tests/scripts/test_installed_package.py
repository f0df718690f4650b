"""What `pip install .` brings: every file of the package, importable without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).replace(".__init__", "")
    for path in (REPOSITORY / "glm_ms").rglob("*.py")
)
# argv: folder of the installed package, modules.
IMPORT_ALL = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project, installed from a copy (building writes into the source folder)."""
    pytest.importorskip("pip", reason="needs pip in the environment of the tests")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    shutil.copytree(REPOSITORY / "glm_ms", source / "glm_ms", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_every_file_is_installed(installed):
    def files(folder: Path) -> set[str]:
        paths = (path for path in (folder / "glm_ms").rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix() for path in paths if "__pycache__" not in path.parts}

    assert files(installed) == files(REPOSITORY)


def test_every_module_imports(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALL, installed, *MODULES],
        cwd=tmp_path,
        env={**os.environ, "LOCAL_DEFAULT_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert len(MODULES) > 50
    assert done.returncode == 0, done.stderr
