"""Jobs of the real msrun that the launcher watches: small scripts without MindSpore, and what becomes of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import left_of

REPOSITORY = Path(__file__).resolve().parents[2]
# Rank 0 waits for its fellow as in a collective. The scheduler, which runs the same script, ends at once.
SCRIPT = """\
import os, subprocess, sys, time
from pathlib import Path
rank = os.environ["RANK_ID"]
if os.environ["MS_ROLE"] == "MS_SCHED":
    sys.exit()
print(f"rank {rank}\\r", *sys.argv[1:], sys.executable)
Path(f"pid_{rank}").write_text(str(os.getpid()))
"""
WAIT = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)\n"


@pytest.fixture
def start(tmp_path: Path):
    """Starts a job of two ranks in a folder of its own; ended with the test."""
    (tmp_path / "logs").mkdir()
    started: list[subprocess.Popen] = []

    def launch(script: str, *arguments: str, line: str = "job.py") -> subprocess.Popen:
        (tmp_path / "job.py").write_text(SCRIPT + script)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "MS_NODE_ID": "7",
            "OF_TEST": str(tmp_path),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "glm_ms.launch.msrun", line, *(arguments or ("2",))],
            cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # fmt: skip
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
    for process in left_of(tmp_path):
        os.kill(process, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    shown, said = process.communicate(timeout=60)
    return process.returncode, shown.decode(), said.decode()


def wait_for_ranks(folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    paths = [folder / "pid_0", folder / "pid_1"]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def test_success_shows_rank_zero_and_keeps_former_logs(start, tmp_path: Path):
    former = tmp_path / "output" / "msrun_log" / "worker_1.log"
    former.parent.mkdir(parents=True)
    former.write_text("of a former job")
    status, shown, said = finish(start("", line="job.py --word 'two words'"))
    assert status == 0, said
    assert shown == f"rank 0\r --word two words {sys.executable}\n"
    assert f"rank 1\r --word two words {sys.executable}\n" == former.read_bytes().decode()
    assert [path.read_text() for path in former.parent.glob("earlier/*/worker_1.log")] == ["of a former job"]
    assert "logs of a former job: output/msrun_log/earlier/" in said
    assert "note: not passed on, as each rank gets its own: MS_NODE_ID" in said


def test_the_first_traceback_is_the_reason(start, tmp_path: Path):
    """Rank 1 fails first; rank 0 notices and ends before rank 1 has."""
    script = """
import traceback
if rank == "1":
    try:
        raise ValueError("ill")
    except ValueError:
        traceback.print_exc()
    time.sleep(600)  # it hangs while it ends
while not Path("output/msrun_log/worker_1.log").read_text().endswith("ill\\n"):
    time.sleep(0.01)
time.sleep(0.5)
raise RuntimeError("a fellow has gone")
"""
    begin = time.monotonic()
    status, _, said = finish(start(script))
    assert status == 1
    assert "last output of rank 1:\nTraceback (most recent call last):\n" in said
    assert "ValueError: ill\n" in said
    assert "RuntimeError" not in said
    assert "after it: rank 0 failed (exit status 1)\n" in said
    assert said.endswith("error: rank 1 failed and did not end by itself, log: output/msrun_log/worker_1.log\n")
    assert time.monotonic() - begin < 30
    assert left_of(tmp_path) == []


def test_a_killed_rank_ends_the_job_within_seconds(start, tmp_path: Path):
    process = start("signal = __import__('signal'); signal.signal(signal.SIGTERM, signal.SIG_DFL)\n" + WAIT)
    _, victim = wait_for_ranks(tmp_path)
    while b"follows" not in (line := process.stderr.readline()):
        assert line
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    status, _, said = finish(process)
    assert time.monotonic() - begin < 5
    assert status == 128 + signal.SIGKILL
    assert "rank 1 was ended by signal 9 (SIGKILL; by a user, or by the system for lack of memory" in said
    assert left_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_all_ranks(start, tmp_path: Path, number: signal.Signals):
    process = start(WAIT)
    wait_for_ranks(tmp_path)
    process.send_signal(number)
    status, _, said = finish(process)
    assert status == 128 + number
    assert "interrupted" in said
    assert left_of(tmp_path) == []


def test_ranks_end_with_a_launcher_that_is_killed(start, tmp_path: Path):
    """SIGKILL gives the launcher no time for anything; the ranks, their children and the guard end all the same."""
    process = start("signal = __import__('signal'); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT)
    wait_for_ranks(tmp_path)
    while b"follows" not in (line := process.stderr.readline()):
        assert line
    assert len(left_of(tmp_path)) >= 6  # launcher, guard, two ranks, a child of each
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while left_of(tmp_path):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.02)


def test_a_rank_that_ignores_the_request_ends_too(start, tmp_path: Path):
    ignoring = "signal = __import__('signal'); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    status, _, said = finish(start(ignoring + "if rank == '1': sys.exit('error: no such file: train.json')\n" + WAIT))
    assert status == 1
    assert "last output of rank 1:" in said
    assert "\nerror: no such file: train.json\n" in said
    assert said.endswith("error: rank 1 failed (exit status 1), log: output/msrun_log/worker_1.log\n")
    assert left_of(tmp_path) == []


def test_join_false_returns_at_once(start, tmp_path: Path):
    status, shown, said = finish(start(WAIT, "2", str(free_port()), "logs", "False", "60"))
    assert status == 0, said
    assert said.endswith("started, and not watched; logs: logs\n")
    assert "Start worker process with rank id:1" in shown
    assert len(left_of(tmp_path)) >= 2  # the fixture ends them


def test_one_job_a_log_folder(start, tmp_path: Path):
    first = start(WAIT)
    wait_for_ranks(tmp_path)
    status, _, said = finish(start(WAIT))
    assert status == 2
    assert "LOG_DIR output/msrun_log: another job is writing its logs there" in said
    first.send_signal(signal.SIGINT)
    assert finish(first)[0] == 130


def test_ends_before_msrun_are_known(start, tmp_path: Path):
    """Ranks that end while msrun is still busy: it would forget their exit statuses."""
    status, shown, said = finish(start("sys.exit(3 if rank == '1' else 0)\n"))
    assert status == 3, shown + said
    assert said.endswith("error: rank 1 failed (exit status 3), log: output/msrun_log/worker_1.log\n")


def test_what_msrun_refuses_is_shown(start, tmp_path: Path):
    (tmp_path / "job.py").write_text("")
    (tmp_path / "logs").rmdir()
    (tmp_path / "bin").mkdir()
    msrun = tmp_path / "bin" / "msrun"
    msrun.write_text("raise SystemError('no such option')")
    msrun.chmod(0o755)
    script = f"import sys\nfrom glm_ms.launch import msrun as m\nm.shutil.which = lambda *a, **k: {str(msrun)!r}\n"
    script += "sys.exit(m.main(['job.py', '2']))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: msrun failed (exit status 1), log: output/msrun_log/msrun.log\n" in done.stderr
    assert done.stderr.endswith("SystemError: no such option\n")
