"""Fixtures and options shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# MindSpore reads it on import; 3 leaves errors only.
os.environ.setdefault("GLOG_v", "3")

REPOSITORY = Path(__file__).resolve().parent.parent
# The genuine tokenizer and the ADGEN records may not be redistributed. They are looked for beside the
# repository, or where GLM_MS_SHARED points; tests that need them are skipped where they are absent.
SHARED = Path(os.environ.get("GLM_MS_SHARED", REPOSITORY.parent / "shared"))
_SHARED_MISSING = "not redistributable data missing"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    missing = sum(_SHARED_MISSING in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"tests skipped for want of the genuine tokenizer or ADGEN data: {missing}")


def _shared_file(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{_SHARED_MISSING}: {relative} (set GLM_MS_SHARED to the folder that holds it)")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of numbers made with the reference implementation; see its README."""
    return REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def vocab_file() -> Path:
    """The genuine tokenizer.model of ChatGLM2 and ChatGLM3."""
    return _shared_file("data/chatglm/tokenizer.model")


@pytest.fixture(scope="session")
def adgen_file() -> Path:
    """The ADGEN development set, 1070 records, one JSON object a line."""
    return _shared_file("data/AdvertiseGen/dev.json")


@pytest.fixture(scope="session")
def chatglm_folder() -> Path:
    """config.json of both released models and the weight index of the 6B."""
    return _shared_file("data/chatglm")
