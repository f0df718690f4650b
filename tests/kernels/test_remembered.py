"""What comparisons of kernels have found, in its file: read, added to, damaged, of another machine, shared."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_ms.kernels.remembered import Outcome, cache_folder, file_for, outcomes

MACHINE = "ascend910b, CANN 8.2, MindSpore 2.9.0, glm_ms 1.0 abc"
GOOD, BAD = Outcome(True, "differs by 0"), Outcome(False, "differs by 9, allowed 1")


class Checks:
    """Checks with given outcomes, and which of them ran."""

    def __init__(self, **found: Outcome) -> None:
        self.found, self.ran = found, list[str]()

    def __call__(self) -> dict[str, Callable[[], Outcome]]:
        return {name: lambda name=name: self.run(name) for name in self.found}

    def run(self, name: str) -> Outcome:
        self.ran.append(name)
        return self.found[name]


def test_a_check_runs_once(tmp_path: Path) -> None:
    checks, lines = Checks(norm=GOOD, attention=BAD), list[str]()
    folder = tmp_path / "made" / "glm_ms"
    assert outcomes(MACHINE, checks(), folder, lines.append) == checks.found
    assert outcomes(MACHINE, checks(), folder, lines.append) == checks.found
    assert checks.ran == ["norm", "attention"]
    more = Checks(norm=BAD, rotary=GOOD)
    assert outcomes(MACHINE, more(), folder, lines.append) == {"norm": GOOD, "rotary": GOOD}
    assert more.ran == ["rotary"]
    stored = json.loads(file_for(MACHINE, folder).read_text())
    assert set(stored["outcomes"]) == {"norm", "attention", "rotary"}
    assert lines == []


def test_another_machine_has_its_own_file(tmp_path: Path) -> None:
    first, second = Checks(norm=GOOD), Checks(norm=BAD)
    outcomes(MACHINE, first(), tmp_path, print)
    other = MACHINE.replace("8.2", "8.3")
    assert outcomes(other, second(), tmp_path, print) == {"norm": BAD}
    assert file_for(MACHINE, tmp_path) != file_for(other, tmp_path)


def test_a_file_that_was_renamed_is_not_believed(tmp_path: Path) -> None:
    outcomes("another card", Checks(norm=BAD)(), tmp_path, print)
    file_for("another card", tmp_path).rename(file_for(MACHINE, tmp_path))
    checks = Checks(norm=GOOD)
    assert outcomes(MACHINE, checks(), tmp_path, print) == {"norm": GOOD}
    assert checks.ran == ["norm"]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", f'{{"machine": "{MACHINE}", "outcomes": []}}',
        f'{{"machine": "{MACHINE}", "outcomes": {{"norm": 1}}}}',
        f'{{"machine": "{MACHINE}", "outcomes": {{"norm": {{"agrees": "yes", "why": ""}}}}}}', "\udcff", "[" * 500,
    ],
)  # fmt: skip
def test_a_damaged_file_costs_a_comparison(tmp_path: Path, content: str) -> None:
    path = file_for(MACHINE, tmp_path)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    checks, lines = Checks(norm=GOOD), list[str]()
    assert outcomes(MACHINE, checks(), tmp_path, lines.append) == {"norm": GOOD}
    assert str(path) in lines[0]
    assert lines[0].endswith("; the kernels are compared again")
    assert outcomes(MACHINE, checks(), tmp_path, lines.append) == {"norm": GOOD}
    assert checks.ran == ["norm"]
    assert len(lines) == 1


def test_a_folder_that_cannot_be_used_costs_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checks, lines = Checks(norm=GOOD), list[str]()
    for _ in range(2):
        assert outcomes(MACHINE, checks(), tmp_path / "file" / "folder", lines.append) == {"norm": GOOD}
    assert checks.ran == ["norm"] * 2
    assert "the next start compares the kernels again" in lines[0]
    assert outcomes(MACHINE, checks(), None, lines.append) == {"norm": GOOD}


def test_a_user_who_ends_a_comparison_leaves_no_outcome(tmp_path: Path) -> None:
    def interrupted() -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcomes(MACHINE, {"norm": lambda: GOOD, "attention": interrupted}, tmp_path, print)
    checks = Checks(norm=BAD, attention=GOOD)
    assert outcomes(MACHINE, checks(), tmp_path, print) == {"norm": GOOD, "attention": GOOD}
    assert checks.ran == ["attention"]


def _ends(folder: Path) -> None:
    outcomes(MACHINE, {"attention": lambda: os._exit(1)}, folder, print)


def test_a_kernel_that_ends_the_process_is_not_tried_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_ends, args=(tmp_path,))
    process.start()
    process.join(20)
    assert process.exitcode == 1
    checks = Checks(attention=GOOD)
    found = outcomes(MACHINE, checks(), tmp_path, print)
    assert found == {"attention": Outcome(False, "the process ended while they were compared")}
    assert checks.ran == []


def _slowly(folder: Path, log: Path) -> None:
    def check() -> Outcome:
        with log.open("a") as file:
            file.write("ran\n")
        time.sleep(0.3)
        return GOOD

    found = outcomes(MACHINE, {"norm": check}, folder, print)
    os._exit(0 if found == {"norm": GOOD} else 1)


def test_of_processes_that_start_together_one_compares(tmp_path: Path) -> None:
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    processes = [context.Process(target=_slowly, args=(tmp_path, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "ran\n"


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "glm_ms"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "glm_ms"
    name = file_for(MACHINE, tmp_path).name
    assert name == "kernels-ascend910b-CANN-8.2-MindSpore-2.9.0-glm_ms-1.0-abc.json"
