"""What importing the package loads. Which package may import which is a contract in pyproject.toml (import-linter)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = {"mindspore", "mindformers", "transformers", "torch"}
WITHOUT_MINDSPORE = ("commands", "data", "launch", "metrics", "settings", "storage", "tokenizer")


def loaded_by(statements: str) -> set[str]:
    """The heavy packages that a new process has loaded after some statements."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statements}\nimport sys\nprint(*sorted({HEAVY!r} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_package_itself_loads_nothing_heavy():
    assert loaded_by("import glm_ms") == set()


def test_public_names_load_without_mindformers():
    assert loaded_by("import glm_ms\nfor name in glm_ms.__all__: getattr(glm_ms, name)") <= {"mindspore"}


@pytest.mark.parametrize("package", WITHOUT_MINDSPORE)
def test_package_loads_without_mindspore(package):
    assert loaded_by(f"import glm_ms.{package}") == set()
