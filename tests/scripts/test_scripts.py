"""The shell scripts: choosing an interpreter and an environment, and what they say when that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"]
ENTRIES = ["quickstart.sh", "test.sh"]
# What environment.sh asks an interpreter: its verdict, then whether it can make environments.
FAKE_PYTHON = """#!/bin/sh
case "$2" in
    *ensurepip*) exit {ensurepip} ;;
    *) echo "{verdict}" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts in a folder with a space in its name."""
    folder = tmp_path / "my project"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def tools_without_python(tmp_path: Path) -> Path:
    """A PATH with everything the scripts call, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "cat", "cksum", "dirname", "mkdir", "rm", "sleep", "tail", "uname"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name))
    return folder


def fake_python(path: Path, verdict: str = "yes", ensurepip: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE_PYTHON.format(verdict=verdict, ensurepip=ensurepip), encoding="utf-8")
    path.chmod(0o755)


def run_script(project: Path, name: str, path: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [shutil.which("bash"), project / "scripts" / name, *arguments],
        env={"PATH": str(path), "HOME": str(project), **environment},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    assert os.access(script, os.X_OK) == (script.name != "environment.sh")


@pytest.mark.parametrize("name", ENTRIES)
def test_no_python(project, tmp_path, name):
    done = run_script(project, name, tools_without_python(tmp_path))
    assert done.returncode == 1
    assert "no Python that fits: python3 is not there; python3.11 is not there" in done.stderr
    assert f"PYTHON=/path/to/python3.11 bash scripts/{name}" in done.stderr
    assert "CPython 3.9, 3.10, 3.11 or 3.12" in done.stderr


def test_unfit_interpreters_are_named(project, tmp_path):
    path = tools_without_python(tmp_path)
    fake_python(path / "python3", "is Python 3.13, 64 bits")
    fake_python(path / "python3.12", "is Python 3.12, 32 bits")
    done = run_script(project, "quickstart.sh", path)
    assert done.returncode == 1
    assert "python3 is Python 3.13, 64 bits; python3.11 is not there; python3.12 is Python 3.12, 32 bits" in done.stderr


def test_an_interpreter_that_does_not_start(project, tmp_path):
    path = tools_without_python(tmp_path)
    (path / "python3").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    (path / "python3").chmod(0o755)
    assert "python3 does not start" in run_script(project, "quickstart.sh", path).stderr


def test_the_chosen_interpreter_is_the_only_one_looked_at(project, tmp_path):
    path = tools_without_python(tmp_path)
    fake_python(path / "python3")
    done = run_script(project, "quickstart.sh", path, PYTHON="/no/python")
    assert done.returncode == 1
    assert "no Python that fits: /no/python is not there\n" in done.stderr


def test_missing_venv_module(project, tmp_path):
    path = tools_without_python(tmp_path)
    fake_python(path / "python3", ensurepip=1)
    done = run_script(project, "quickstart.sh", path)
    assert done.returncode == 1
    assert "python3 fits, but its module venv (or ensurepip) is missing" in done.stderr
    assert "python3-venv" in done.stderr


def test_real_interpreter_is_judged(project, tmp_path):
    """The running interpreter fits; its environment lacks everything else, so it ends at pip."""
    folder = project / ".venv"
    (folder / "bin").mkdir(parents=True)
    launcher = folder / "bin" / "python"
    launcher.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    done = run_script(project, "quickstart.sh", tools_without_python(tmp_path))
    assert done.returncode == 1
    assert f"{folder} has no pip" in done.stderr


def test_environment_of_an_unfit_version(project, tmp_path):
    fake_python(project / ".venv" / "bin" / "python", "is Python 3.13, 64 bits")
    done = run_script(project, "test.sh", tools_without_python(tmp_path))
    assert done.returncode == 1
    assert "bin/python is Python 3.13, 64 bits; MindSpore 2.9.0 needs" in done.stderr
    assert "Remove" in done.stderr


def test_environment_without_python(project, tmp_path):
    (project / ".venv").mkdir()
    done = run_script(project, "test.sh", tools_without_python(tmp_path))
    assert done.returncode == 1
    assert "is no virtual environment (no bin/python)" in done.stderr


def test_active_environment_that_is_gone(project, tmp_path):
    done = run_script(project, "test.sh", tools_without_python(tmp_path), VIRTUAL_ENV="/gone")
    assert done.returncode == 1
    assert "unset VIRTUAL_ENV" in done.stderr


def test_ignored_choice_is_said(project, tmp_path):
    fake_python(project / ".venv" / "bin" / "python", "is Python 3.13, 64 bits")
    done = run_script(project, "test.sh", tools_without_python(tmp_path), PYTHON="python3.11")
    assert "note: PYTHON=python3.11 is not used" in done.stderr


def test_failed_installation_shows_the_end_of_the_log(project, tmp_path):
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '    "-m pip --version") ;;\n'
        '    "-m pip install"*) echo "ERROR: No matching distribution"; exit 1 ;;\n'
        '    *sys.prefix*) echo "${0%/bin/python}" ;;\n'
        '    *version_info*) echo "yes" ;;\n'
        "    *) exit 1 ;;\n"
        "esac\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    done = run_script(project, "quickstart.sh", tools_without_python(tmp_path))
    assert done.returncode == 1
    assert "ERROR: No matching distribution" in done.stderr
    assert "pip could not install the project (all of its output:" in done.stderr
    assert (project / "output" / "install.log").is_file()


def test_quickstart_takes_no_arguments(project, tmp_path):
    done = run_script(project, "quickstart.sh", tools_without_python(tmp_path), "--fast")
    assert done.returncode == 1
    assert "quickstart.sh takes no arguments: --fast" in done.stderr
