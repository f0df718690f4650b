"""Jobs of msrun for tests: two CPU processes that run run_glm.py, or a script of a test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_helpers import REPOSITORY, environment_of_a_user

SCRIPTS = REPOSITORY / "tests" / "engine" / "msrun_scripts"


class RankJob:
    """Two ranks that have been started. Skips the test where there is no msrun beside this Python.

    Args:
        folder: made here; receives `msrun/worker_*.log`.
        arguments: of the script.
        script: what the ranks run.

    Attributes:
        process: msrun itself.
    """

    def __init__(self, folder: Path, arguments: list[str], script: Path = REPOSITORY / "run_glm.py") -> None:
        programs = str(Path(sys.executable).parent)
        if shutil.which("msrun", path=programs) is None:
            pytest.skip("no msrun beside this Python")
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # msrun starts the `python` of PATH.
        environment = {**environment_of_a_user(), "PATH": f"{programs}:{os.environ['PATH']}"}
        self.folder = folder
        self._said = (folder / "msrun.txt").open("wb")
        self.process = subprocess.Popen(
            ["msrun", "--worker_num", "2", "--local_worker_num", "2", "--master_port", str(port), "--join", "True",
             "--log_dir", str(folder / "msrun"), str(script), *map(str, arguments)],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
            start_new_session=True
        )  # fmt: skip

    def log(self, rank: int) -> str:
        """What a rank has written to its standard streams so far, without lines of MindSpore."""
        path = self.folder / "msrun" / f"worker_{rank}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(line for line in lines if "] DISTRIBUTED(" not in line)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Looks again and again, as long as the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll() is not None
            if (ended and not condition()) or time.monotonic() > deadline:
                pytest.fail(f"the job {'has ended' if ended else 'goes on'}: {self.log(0)}{self.log(1)}")
            time.sleep(0.01)

    def ranks_alive(self) -> int:
        """How many ranks run; the scheduler, which msrun waits for, is none."""
        return sum(_role(process) == "MS_WORKER" for process in _descendants(self.process.pid))

    def end_scheduler(self) -> None:
        """Spares the half minute in which msrun waits for it once the ranks have failed."""
        for process in _descendants(self.process.pid):
            if _role(process) == "MS_SCHED":
                os.kill(process, signal.SIGKILL)

    def finish(self, timeout: float = 300) -> int:
        """Waits for the end; the exit status."""
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def succeed(self) -> RankJob:
        """Waits for the end, which must be a success."""
        status = self.finish()
        assert status == 0, (self.folder / "msrun.txt").read_text() + self.log(0) + self.log(1)
        return self

    def kill(self) -> None:
        """SIGKILL to msrun, the scheduler and the ranks, each of which leads a group of processes."""
        ours = {self.process.pid, *_descendants(self.process.pid)}
        for process in ours:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._said.close()


def _role(process: int) -> str:
    """MS_ROLE of a process; nothing if it has ended."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((text[8:].decode() for text in variables if text.startswith(b"MS_ROLE=")), "")


def _descendants(process: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == process:
            child = int(path.parent.name)
            found |= {child, *_descendants(child)}
    return found
