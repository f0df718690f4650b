"""What the launchers take from the logs of ranks, and how they keep those of former jobs."""

from __future__ import annotations

import os
from pathlib import Path

from glm_ms.launch.rank_job import LogFolder
from glm_ms.launch.rank_logs import LogWatch, ends_with_traceback, reason_in

NOISE = "[WARNING] DISTRIBUTED(4715,7fb2f544bb80,python):2026-01-01-00:00:01.565.185 [tcp_comm.cc:485] Connect] 1\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 7, in <module>\n    f()\nValueError: ill\n'
CHAIN = (
    'Traceback (most recent call last):\n  File "a.py", line 1, in g\n    {}["x"]\nKeyError: \'x\'\n\n'
    "During handling of the above exception, another exception occurred:\n\n"
)
CPP = "\n" + "-" * 52 + "\n- C++ Call Stack: (For framework developers)\n" + "-" * 52 + "\nmindspore/ccsrc/a.cc:1 Run\n"


def test_the_traceback_stands_without_what_is_around_it():
    text = f"step 1\n{NOISE}{TRACEBACK}{NOISE}"
    assert reason_in(text) == TRACEBACK.strip()


def test_lines_of_mindspore_within_are_left_out():
    head, tail = TRACEBACK.split("    f()\n")
    assert reason_in(f"{head}{NOISE}    f()\n{tail}") == TRACEBACK.strip()


def test_a_chain_is_shown_whole():
    assert reason_in(f"{TRACEBACK}step 2\n{CHAIN}{TRACEBACK}") == (CHAIN + TRACEBACK).strip()


def test_the_stack_for_developers_is_left_out():
    assert reason_in(f"{TRACEBACK}{CPP}") == TRACEBACK.strip()


def test_tracebacks_of_the_end_are_not_the_reason():
    aftermath = "Exception ignored in: <function x>\n" + TRACEBACK.replace("ill", "late")
    assert reason_in(f"{TRACEBACK}{aftermath}") == TRACEBACK.strip()
    alone = reason_in(f"error: no file\n{aftermath}")
    assert alone.startswith("error: no file")


def test_without_a_traceback_the_last_lines_are_shown():
    lines = [f"step {number}" for number in range(100)]
    text = "\n".join(lines) + f"\n 10%|#\r 20%|##\r\n{NOISE}[ERROR] ME(1,7f,python): no memory\nerror: bad file\n"
    shown = reason_in(text).split("\n")
    assert shown[-3:] == [" 20%|##", "[ERROR] ME(1,7f,python): no memory", "error: bad file"]
    assert len(shown) <= 20
    assert "step 50" not in shown


def test_a_silent_log_has_no_reason():
    assert reason_in("") == ""
    assert reason_in(NOISE) == ""


def test_long_tracebacks_are_cut_in_the_middle():
    frames = "".join(f'  File "a.py", line {n}, in f\n' for n in range(500))
    shown = reason_in(f"Traceback (most recent call last):\n{frames}ValueError: deep\n").split("\n")
    assert len(shown) == 81
    assert shown[0] == "Traceback (most recent call last):"
    assert shown[40] == "... 422 lines left out, see the log ..."
    assert shown[-1] == "ValueError: deep"


def test_a_log_that_goes_on_after_a_traceback_does_not_end_with_it():
    assert ends_with_traceback(TRACEBACK + NOISE)
    assert ends_with_traceback(TRACEBACK + CPP.split("mindspore/")[0])
    assert not ends_with_traceback(f"{TRACEBACK}step 2\n")
    assert not ends_with_traceback("step 2\n")


def test_a_log_is_read_while_it_grows_and_after_it_was_moved(tmp_path: Path):
    seen: list[bytes] = []
    path = tmp_path / "worker_0.log"
    log = LogWatch(path, seen.append)
    log.update()
    with path.open("wb", buffering=0) as file:
        file.write(b" 10%\r")
        log.update()
        assert seen
        file.write(b" 20%\rTraceback (most rec")
        log.update()
        assert log.traceback_time is None
        path.rename(tmp_path / "moved")
        file.write(b"ent call last):\n")
        log.update()
    assert log.traceback_time is not None
    assert b"".join(seen) == b" 10%\r 20%\rTraceback (most recent call last):\n"


def test_former_logs_are_kept(tmp_path: Path):
    logs = [tmp_path / "worker_0.log", tmp_path / "rank_1" / "run.log"]
    folder = LogFolder(tmp_path, "logs", "")
    folder.make_room(logs, logs)
    assert not (tmp_path / "earlier").exists()
    for text in ("first", "second"):
        for path in logs:
            path.write_text(text)
            os.utime(path, (1e9, 1e9))  # both jobs in the same second
        (tmp_path / "notes.txt").write_text("mine")
        folder.make_room(logs, logs)
        assert {path.read_text() for path in logs} == {""}
    kept = sorted((tmp_path / "earlier").iterdir())
    assert len(kept) == 2
    for folder, text in zip(kept, ("first", "second")):
        assert (folder / "worker_0.log").read_text() == text
        assert (folder / "rank_1" / "run.log").read_text() == text
    assert (tmp_path / "notes.txt").exists()
