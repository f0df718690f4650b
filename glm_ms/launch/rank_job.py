"""A job of several ranks on this machine: starts and watches them, shows one live, ends all when one fails."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glm_ms.launch.guard import Guard
from glm_ms.launch.processes import Interrupts, adopt_orphans, claim, kill_descendants, reap, send
from glm_ms.launch.rank_logs import LogWatch, ends_with_traceback, reason_in
from glm_ms.storage.errors import FileError

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between the request to end and SIGKILL
# The scheduler of msrun runs the same script as the ranks: if all fail, the error of a rank says more.
SCHEDULER_PATIENCE = 5.0
# A rank that wrote its traceback and hangs while it ends is the cause of a failure that follows in this time.
_HANGING_SECONDS = 120.0
_SCHEDULER_END_SECONDS = 60.0
_EARLIER = "earlier"  # subfolder for logs of earlier jobs
# Set by msrun and other launchers for their own processes; wrong for the processes of another job.
JOB_VARIABLES = (
    "MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_SERVER_NUM", "MS_NODE_ID", "MS_TOPO_TIMEOUT",
    "RANK_ID", "RANK_SIZE", "RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "DEVICE_ID", "DEVICE_NUM",
)  # fmt: skip


class LaunchError(ValueError):
    """A job cannot be started; the message has the reason and the remedy."""


def run_command(usage: str, launch: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Command line of a launcher; returns 2 for wrong arguments or a job that cannot be started, else as `launch`."""
    if arguments and arguments[0] in ("-h", "--help"):
        _show(usage.encode())
        return 0
    try:
        if arguments:
            return launch(arguments)
        say(usage)
    except (LaunchError, FileError, OSError) as error:
        say(f"error: {error}")
    return 2


def product_hint(text: str) -> str:
    """What to write in place of `8*2`; empty for other text."""
    product = re.fullmatch(r"\s*(\d{1,6})\s*[*xX]\s*(\d{1,6})\s*", text)
    return f"write {int(product[1]) * int(product[2])}" if product else ""


def say(line: str) -> None:
    """Prints a line for the user to standard error."""
    print(line, file=sys.stderr, flush=True)


def _show(piece: bytes) -> None:
    """Prints bytes to standard output, unchanged and at once, progress bars included."""
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def job_environment() -> dict[str, str]:
    """The environment without variables of an outer job and, because msrun starts `python`, this one first on PATH."""
    dropped = [name for name in JOB_VARIABLES if name in os.environ]
    if dropped:
        say(f"note: not passed on, as each rank gets its own: {', '.join(dropped)}")
    environment = {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}
    programs = str(Path(sys.executable).absolute().parent)
    environment["PATH"] = os.pathsep.join([programs, *filter(None, [os.environ.get("PATH")])])
    environment.setdefault("PYTHONUNBUFFERED", "1")  # the output of ranks is shown live
    return environment


@dataclass(frozen=True)
class LogFolder:
    """A folder for the logs of one job at a time; a LaunchError calls it `name` and ends with `remedy`."""

    path: Path
    name: str
    remedy: str

    def claim(self) -> socket.socket:
        """Claims the folder for one job; returns the claim. Raises LaunchError if another job has the folder."""
        holder = claim(f"logs {self.path.resolve()}")
        if holder is None:
            raise LaunchError(f"{self.name}: another job is writing its logs there; {self.remedy}")
        return holder

    def make_room(self, earlier: Iterable[Path], own: Iterable[Path]) -> None:
        """Moves those of the logs `earlier` away that exist, and creates the empty logs `own`.

        Raises LaunchError if logs cannot be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            kept = _keep_earlier_logs(self.path, list(filter(Path.is_file, earlier)))
            for log in own:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.touch()
        except OSError as error:
            reason = f"logs cannot be written there ({error.strerror}: {error.filename})"
            raise LaunchError(f"{self.name}: {reason}; {self.remedy}") from None
        if kept is not None:
            say(f"logs of a former job: {kept}")


def _keep_earlier_logs(folder: Path, logs: Sequence[Path]) -> Path | None:
    """Moves logs, if any, to `earlier/DATE_TIME/`, the time at which they last changed; returns that folder."""
    if not logs:
        return None
    moment = time.strftime("%Y%m%d_%H%M%S", time.localtime(max(path.stat().st_mtime for path in logs)))
    target, number = folder / _EARLIER / moment, 1
    while target.exists():
        number += 1
        target = folder / _EARLIER / f"{moment}_{number}"
    for path in logs:
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    return target


@contextmanager
def guarded(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields the environment for the processes of a job. They end with the block if it raises, or with this process."""
    adopt_orphans()
    guard = Guard(environment)
    try:
        yield guard.environment
    except BaseException:
        kill_descendants()
        raise
    finally:
        guard.dismiss()


@dataclass(eq=False)
class Member:
    """One process of a job that this process has started or adopted."""

    process: int
    name: str  # "rank 3", or "scheduler"
    log: Path  # of its standard output and error
    is_rank: bool = True
    status: int | None = None  # exit status, negative for a signal; None while it runs
    end: float = math.inf  # when it was seen to have ended, as `time.monotonic()`

    def __post_init__(self) -> None:
        self.watch = LogWatch(self.log)

    @property
    def failure(self) -> str:
        """How it failed, for messages."""
        if self.status is None:
            return f"{self.name} failed and did not end by itself"
        if self.status >= 0:
            return f"{self.name} failed (exit status {self.status})"
        number = signal.Signals(-self.status)
        hint = "; by a user, or by the system for lack of memory: see dmesg" if number == signal.SIGKILL else ""
        return f"{self.name} was ended by signal {number:d} ({number.name}{hint})"


class RankJob:
    """Processes of a job; `alone` if all ranks of the job are on this machine."""

    def __init__(self, members: Sequence[Member], interrupts: Interrupts, alone: bool) -> None:
        self._members, self._interrupts, self._alone = members, interrupts, alone
        self._viewer = _Viewer(next(member.log for member in members if member.is_rank))

    def wait(self) -> int:
        """Waits for the end of all ranks, and shows the output of the first one live.

        Returns 0 if all ranks succeeded; else the exit status of the one that failed first, 128 + N for signal N; 130,
        143 or 129 if this process was interrupted.
        """
        self._viewer.start()
        while self._ranks_running() and not self._interrupts.received and not self._has_failed():
            self._look()
            time.sleep(POLL_SECONDS)
        if not self._interrupts.received and not self._has_failed():
            self._wait_for_scheduler()
        self._look()
        if self._interrupts.received:
            return self._interrupted()
        return self._failed() if self._has_failed() else self._succeeded()

    def _look(self) -> None:
        """Reads the logs, then collects ended processes: so a traceback is known before its rank has ended."""
        for member in self._members:
            member.watch.update()
        for process, status in reap():
            for member in self._running():
                if member.process == process:
                    member.status, member.end = status, time.monotonic()

    def _running(self) -> list[Member]:
        return [member for member in self._members if member.status is None]

    def _ranks_running(self) -> bool:
        return any(member.is_rank for member in self._running())

    def _bad_ends(self, ranks: bool) -> list[Member]:
        """Failed processes, in the order in which they ended."""
        failed = (member for member in self._members if member.status and member.is_rank == ranks)
        return sorted(failed, key=lambda member: member.end)

    def _has_failed(self) -> bool:
        if self._bad_ends(ranks=True):
            return True
        schedulers = self._bad_ends(ranks=False)
        if not self._ranks_running():
            # If all ranks are on this machine, the job has succeeded, even if the scheduler fails.
            return bool(schedulers) and not self._alone
        late = time.monotonic() - SCHEDULER_PATIENCE
        return any(member.end < late for member in schedulers)

    def _wait_for_scheduler(self) -> None:
        """After the ranks of this machine succeeded: the scheduler ends after the ranks of all machines."""
        begin, told = time.monotonic(), False
        while self._running() and not self._interrupts.received:
            self._look()
            waited = time.monotonic() - begin
            if self._alone and waited > _SCHEDULER_END_SECONDS:
                say(f"note: all ranks have succeeded; killing the scheduler, still there after {waited:.0f} s")
                return
            if not self._alone and waited > 10 and not told:
                say("the ranks of this server have succeeded; waiting for those of the other servers")
                told = True
            time.sleep(POLL_SECONDS)

    def _succeeded(self) -> int:
        self._viewer.stop()
        for member in self._bad_ends(ranks=False):
            say(f"note: all ranks have succeeded, but {member.failure}, log: {member.log}")
        for member in self._running():  # a scheduler that does not end
            send(member.process, signal.SIGKILL)
        return 0

    def _failed(self) -> int:
        cause = self._cause()
        # Described before the others, which did not fail, and perhaps the cause itself end on request.
        error = f"error: {cause.failure}, log: {cause.log}"
        status = 1 if cause.status is None else cause.status
        also = ", ".join(member.failure for member in self._bad_ends(ranks=True) if member is not cause)
        self._end_all(signal.SIGTERM)
        self._viewer.stop()
        reason = reason_in(cause.watch.text())
        say(f"\nlast output of {cause.name}:\n{reason}\n" if reason else f"\n{cause.name} wrote nothing.\n")
        if also:
            say(f"after it: {also}")
        say(error)
        return 128 - status if status < 0 else status or 1

    def _cause(self) -> Member:
        """The process that failed first. A failure begins with the traceback, if there is one: ranks that wait for
        the failed one may end before it has ended itself."""
        ended = self._bad_ends(ranks=True) or self._bad_ends(ranks=False)
        first_end = ended[0].end
        begun = {member: member.end for member in ended}
        for member in (*ended, *self._running()):
            moment = member.watch.traceback_time
            if moment is None or first_end - moment > _HANGING_SECONDS or not member.is_rank:
                continue
            if member in begun or ends_with_traceback(member.watch.text()):
                begun[member] = moment
        return min(begun, key=begun.__getitem__)

    def _interrupted(self) -> int:
        number = self._interrupts.received
        say(f"\n{signal.Signals(number).name}: ending all ranks")
        self._end_all(number)
        self._viewer.stop()
        say(f"interrupted; logs: {self._members[0].log.parent}")
        return 128 + number

    def _end_all(self, number: int) -> None:
        """Sends a signal to all processes, and SIGKILL after a while, or after another signal to this process."""
        for member in self._running():
            send(member.process, number)
        deadline, signals = time.monotonic() + GRACE_SECONDS, self._interrupts.count
        while self._running() and time.monotonic() < deadline and self._interrupts.count == signals:
            self._look()
            time.sleep(POLL_SECONDS / 2)
        left = kill_descendants()
        if left:
            say(f"warning: these processes cannot be killed: {', '.join(map(str, left))}")


class _Viewer(threading.Thread):
    """Prints a log while it grows. A thread: a slow reader of the output must not delay the watch."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="viewer", daemon=True)
        self._log = LogWatch(path, _show)
        self._ending = threading.Event()

    def stop(self) -> None:
        """Prints the rest of the log, within 2 seconds."""
        self._ending.set()
        self.join(timeout=2)

    def run(self) -> None:
        try:
            while not self._ending.wait(POLL_SECONDS):
                self._log.update()
            self._log.update()
        except OSError:  # the reader of the output has closed the pipe; the job continues
            return
