"""scripts/quickstart.sh from beginning to end."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path):
    """A copy of the project in a folder with a space in its name, with an environment that borrows the packages
    of this one, so that nothing is downloaded."""
    folder = tmp_path / "my project"
    for name in ("configs", "glm_ms", "scripts", "tools"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "run_glm.py"):
        shutil.copy(REPOSITORY / name, folder)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True, timeout=300)
    packages = next((folder / ".venv" / "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return folder


def run_quickstart(project: Path) -> str:
    hidden = ("VIRTUAL_ENV", "PYTHON", "PYTHONPATH", "LOCAL_DEFAULT_PATH")
    done = subprocess.run(
        ["bash", project / "scripts" / "quickstart.sh"],
        cwd="/",
        env={name: value for name, value in os.environ.items() if name not in hidden},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_quickstart_trains_a_model_that_writes_adverts(project):
    shown = run_quickstart(project)
    assert "synthetic" in shown
    assert "advert:" in shown
    assert "reference:" in shown
    output = project / "output" / "quickstart"
    before, after = (json.loads((output / name / "eval_scores.json").read_text()) for name in ("before", "after"))
    assert after["rouge-l"] > 90 > 20 > before["rouge-l"]
    assert after["bleu-4"] > 90 > 20 > before["bleu-4"]
    assert before["perplexity"] > 10 * after["perplexity"]
    assert f"{after['rouge-l']:.2f}" in shown
