"""Fixtures and options shared by all tests."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# MindSpore reads it on import; 3 leaves errors only.
os.environ.setdefault("GLOG_v", "3")

REPOSITORY = Path(__file__).resolve().parent.parent
# The genuine tokenizer and the ADGEN records may not be redistributed. They are looked for beside the
# repository, or where GLM_MS_SHARED points; tests that need them are skipped where they are absent.
SHARED = Path(os.environ.get("GLM_MS_SHARED", REPOSITORY.parent / "shared"))
_SHARED_MISSING = "not redistributable data missing"
_SLOW = "slow; run with --slow"
# Kills, resumed runs and clusters: what an interrupted run must have reached.
RUN_FIRST = (
    "test_kills", "test_resume", "test_whole_job", "test_data_parallel", "test_slices", "test_cluster_numbers",
    "test_strategies", "test_resharding",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that prints the summary
        config.pluginmanager.register(Account(), "account")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(RUN_FIRST))
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=_SLOW))


def pytest_collection_finish() -> None:
    """MindSpore collects garbage whenever it compiles; the modules imported so far need not be searched each time."""
    gc.collect()
    gc.freeze()


class Account:
    """Counts, by name, what a run has skipped, and what it has not reached when it was interrupted.

    The lines also go to the file that GLM_MS_TEST_ACCOUNT names, failures at once: `.ci/run` reads them, also after
    a run that was interrupted or killed.
    """

    def __init__(self) -> None:
        self.collected: set[str] = set()
        self.file = os.environ.get("GLM_MS_TEST_ACCOUNT", os.devnull)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write([f"failed: {report.nodeid}"])

    def write(self, lines: list[str]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.collected.update(ids)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        # xdist appends "@group" to ids; a test that was interrupted has no report.
        reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, "nodeid")]
        reached = {report.nodeid.split("@")[0] for report in reports}
        missed = sorted({name.split("@")[0] for name in self.collected} - reached)
        reasons: dict[str, list[str]] = {}
        for report in terminalreporter.stats.get("skipped", []):
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
        slow = reasons.pop(_SLOW, [])
        lines = [f"not run, slow: {len(slow)} tests (run them with --slow)"] if slow else []
        lines += _named("not reached in time", missed) if missed else []
        for reason, names in sorted(reasons.items()):
            lines += _named(f"skipped, {reason}", names)
        lines = lines or ["every collected test was run"]
        for line in lines:
            terminalreporter.write_line(line)
        self.write(lines)


def _named(title: str, tests: list[str]) -> list[str]:
    """A count, then each file with the names of its tests; a name with several parameters is counted."""
    files: dict[str, Counter[str]] = {}
    for test in sorted(tests):
        file, _, name = test.partition("::")
        files.setdefault(file, Counter())[name.partition("[")[0]] += 1
    rows = {
        file: ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())
        for file, names in files.items()
    }
    return [f"{title}: {len(tests)} tests", *(f"    {file}: {names}" for file, names in rows.items())]


def _shared_file(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{_SHARED_MISSING}: {relative} (set GLM_MS_SHARED to the folder that holds it)")
    return path


@pytest.fixture(scope="session", autouse=True)
def cpu_library() -> None:
    """Builds the C++ kernels if the checkout has none of its present sources; one process does, the others wait."""
    from glm_ms.ops.cpu import build, library
    from glm_ms.storage.lock import locked

    with locked(build.SOURCES, folder=True, on_wait=lambda: None):
        if library.is_built():
            return
        try:
            build.build()
        except build.BuildError as error:
            print(f"tests run without C++ kernels: {error}")


@pytest.fixture(autouse=True)
def no_flags_of_other_programs() -> Iterator[None]:
    """Messages name the flags of the program that runs: each test begins without one."""
    from glm_ms import spelling

    with spelling.of_program():
        spelling.register_flags({})
        yield


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
