"""The top level of the repository and the version. Ruff, import-linter, deptry and mypy check the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glm_ms.version import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "configs", "glm_ms", "tools", "scripts", "tests", "run_glm.py", "README.md", "README_CN.md",
    "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs",
}  # fmt: skip


def test_the_top_level_has_only_known_names():
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: build products cannot be told from files of the project")
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode("utf-8")
    names = {path.split("/")[0] for path in listing.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_version_is_in_the_changelog():
    path = REPOSITORY / "CHANGELOG.md"
    assert path.is_file(), "CHANGELOG.md is missing"
    changelog = path.read_text(encoding="utf-8")
    assert re.search(rf"^#+ .*(?<![\d.]){re.escape(__version__)}(?![\d.])", changelog, re.MULTILINE), (
        f"CHANGELOG.md: no heading for version {__version__}"
    )
