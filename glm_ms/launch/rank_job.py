"""A job of several ranks on this machine: starts and watches them, shows one live, ends all when one fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_ms.launch.guard import Guard
from glm_ms.launch.processes import Interrupts, adopt_orphans, descendants, kill_descendants, send
from glm_ms.launch.rank_logs import LogWatch, ends_with_traceback, keep_earlier_logs, reason_in
from glm_ms.storage.errors import FileError

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between the request to end and SIGKILL
# The scheduler of msrun runs the same script as the ranks: if all fail, the error of a rank says more.
SCHEDULER_PATIENCE = 5.0
# A rank that wrote its traceback and hangs while it ends is the cause of a failure that follows in this time.
_HANGING_SECONDS = 120.0
_SCHEDULER_END_SECONDS = 60.0

Say = Callable[[str], None]
Show = Callable[[bytes], None]


class LaunchError(ValueError):
    """A job cannot be started; the message has the reason and the remedy."""


@dataclass(frozen=True)
class Member:
    """One process of a job.

    Attributes:
        name: "rank 3", or "scheduler".
        log: file of its standard output and error.
        is_rank: False for the scheduler.
    """

    name: str
    log: Path
    is_rank: bool = True


def run_command(usage: str, launch: Callable[[Sequence[str], Say, Show], int], arguments: Sequence[str]) -> int:
    """Command line of a launcher.

    Returns:
        The exit status: 2 for wrong arguments or a job that cannot be started, else that of `launch`.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        _show_on_stdout(usage.encode())
        return 0
    try:
        if arguments:
            return launch(arguments, _say_on_stderr, _show_on_stdout)
        _say_on_stderr(usage)
    except (LaunchError, FileError, OSError) as error:
        _say_on_stderr(f"error: {error}")
    return 2


def _say_on_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _show_on_stdout(piece: bytes) -> None:
    """Prints bytes unchanged and at once, progress bars included."""
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def make_room_for_logs(
    folder: Path, earlier: Callable[[], Iterable[Path]], own: Iterable[Path], name: str, say: Say
) -> None:
    """Creates empty logs, after moving those of earlier jobs away.

    Args:
        folder: folder of the logs.
        earlier: gives the logs to move.
        own: logs of this job.
        name: of `folder`, for the error.
        say: receives the place of the earlier logs.

    Raises:
        LaunchError: logs cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = keep_earlier_logs(folder, list(earlier()))
        for log in own:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
    except OSError as error:
        raise LaunchError(
            f"{name}: logs cannot be written there ({error.strerror}: {error.filename}); choose another folder"
        ) from None
    if kept is not None:
        say(f"logs of a former job: {kept}")


def run_ranks(
    start: Callable[[dict[str, str]], dict[int, Member]],
    environment: Mapping[str, str],
    interrupts: Interrupts,
    say: Say,
    show: Show,
    alone: bool,
) -> int:
    """Starts ranks and waits for their end; no process of the job is left afterwards.

    Args:
        start: starts the ranks with an environment; process -> member.
        environment: environment of the ranks.
        interrupts: signals of this process.
        say: receives lines for the user.
        show: receives the output of the first rank of this machine, live.
        alone: whether all ranks of the job are on this machine.

    Returns:
        The exit status: see `RankJob.wait`.
    """
    adopt_orphans()
    guard = Guard(environment)
    try:
        members = start(guard.environment)
        if not members:
            end_started()
            say("interrupted while the ranks were being started")
            return 128 + interrupts.received
        return RankJob(members, interrupts, say, show, alone).wait()
    except BaseException:
        end_started()
        raise
    finally:
        guard.dismiss()


class RankJob:
    """Processes that this one has started or adopted. Arguments: see `run_ranks`."""

    def __init__(
        self, members: Mapping[int, Member], interrupts: Interrupts, say: Say, show: Show, alone: bool
    ) -> None:
        self._members = dict(members)
        self._interrupts, self._say, self._alone = interrupts, say, alone
        self._running = set(members)
        self._ends: dict[int, tuple[float, int]] = {}  # process -> time, exit status (of a signal: negative)
        self._logs = {process: LogWatch(member.log) for process, member in members.items()}
        shown = next(member.log for member in members.values() if member.is_rank)
        self._viewer = _Viewer(shown, show)

    def wait(self) -> int:
        """Waits for the end of all ranks; no process of the job is left afterwards.

        Returns:
            0 if all ranks succeeded; else the exit status of the one that failed first, 128 + N for signal N;
            130, 143 or 129 if this process was interrupted.
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
        for log in self._logs.values():
            log.update()
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process in self._running:
                self._running.discard(process)
                self._ends[process] = (time.monotonic(), os.waitstatus_to_exitcode(status))

    def _ranks_running(self) -> bool:
        return any(self._members[process].is_rank for process in self._running)

    def _bad_ends(self, ranks: bool) -> list[int]:
        """Failed processes, in the order in which they ended."""
        return [p for p, (_, status) in self._ends.items() if status and self._members[p].is_rank == ranks]

    def _has_failed(self) -> bool:
        if self._bad_ends(ranks=True):
            return True
        schedulers = self._bad_ends(ranks=False)
        if not self._ranks_running():
            # If all ranks are on this machine, the job has succeeded, even if the scheduler fails.
            return bool(schedulers) and not self._alone
        late = time.monotonic() - SCHEDULER_PATIENCE
        return any(self._ends[process][0] < late for process in schedulers)

    def _wait_for_scheduler(self) -> None:
        """After the ranks of this machine succeeded: the scheduler ends after the ranks of all machines."""
        begin, told = time.monotonic(), False
        while self._running and not self._interrupts.received:
            self._look()
            waited = time.monotonic() - begin
            if self._alone and waited > _SCHEDULER_END_SECONDS:
                self._say(f"note: all ranks have succeeded; killing the scheduler, still there after {waited:.0f} s")
                return
            if not self._alone and waited > 10 and not told:
                self._say("the ranks of this server have succeeded; waiting for those of the other servers")
                told = True
            time.sleep(POLL_SECONDS)

    def _succeeded(self) -> int:
        self._viewer.stop()
        for process in self._bad_ends(ranks=False):
            log = self._members[process].log
            self._say(f"note: all ranks have succeeded, but {self._described(process)}, log: {log}")
        for process in self._running:  # a scheduler that does not end
            send(process, signal.SIGKILL)
        return 0

    def _failed(self) -> int:
        cause, others = self._cause(), self._bad_ends(ranks=True)
        self._end_all(signal.SIGTERM)
        self._viewer.stop()
        member = self._members[cause]
        reason = reason_in(self._logs[cause].text())
        self._say("")
        self._say(f"last output of {member.name}:\n{reason}\n" if reason else f"{member.name} wrote nothing.\n")
        also = ", ".join(self._described(process) for process in others if process != cause)
        if also:
            self._say(f"after it: {also}")
        self._say(f"error: {self._described(cause)}, log: {member.log}")
        status = self._ends[cause][1] if cause in self._ends else 1
        return 128 - status if status < 0 else status or 1

    def _cause(self) -> int:
        """The process that failed first. A failure begins with the traceback, if there is one: ranks that wait for
        the failed one may end before it has ended itself."""
        ended = self._bad_ends(ranks=True) or self._bad_ends(ranks=False)
        first_end = min(self._ends[process][0] for process in ended)
        begun = {process: self._ends[process][0] for process in ended}
        for process in (*ended, *self._running):
            log = self._logs[process]
            moment = log.traceback_time
            if moment is None or first_end - moment > _HANGING_SECONDS or not self._members[process].is_rank:
                continue
            if process in begun or ends_with_traceback(log.text()):
                begun[process] = moment
        return min(begun, key=begun.__getitem__)

    def _described(self, process: int) -> str:
        name = self._members[process].name
        if process not in self._ends:
            return f"{name} failed and did not end by itself"
        status = self._ends[process][1]
        if status >= 0:
            return f"{name} failed (exit status {status})"
        hint = "; by a user, or by the system for lack of memory: see dmesg" if -status == signal.SIGKILL else ""
        return f"{name} was ended by signal {-status} ({signal.Signals(-status).name}{hint})"

    def _interrupted(self) -> int:
        number = self._interrupts.received
        self._say(f"\n{signal.Signals(number).name}: ending all ranks")
        self._end_all(number)
        self._viewer.stop()
        self._say(f"interrupted; logs: {next(iter(self._members.values())).log.parent}")
        return 128 + number

    def _end_all(self, number: int) -> None:
        """Sends a signal to all processes, and SIGKILL after a while."""
        for process in self._running:
            send(process, number)
        deadline = time.monotonic() + GRACE_SECONDS
        signals = self._interrupts.count
        ends = dict(self._ends)
        while self._running and time.monotonic() < deadline and self._interrupts.count == signals:
            self._look()
            time.sleep(POLL_SECONDS / 2)
        self._ends = ends  # processes that end on request did not fail
        left = kill_descendants()
        if left:
            self._say(f"warning: these processes cannot be killed: {', '.join(map(str, left))}")


def end_started() -> None:
    """Ends everything that this process has started, if there is no job yet."""
    for process in descendants(os.getpid()):
        send(process, signal.SIGTERM)
    kill_descendants()


class _Viewer:
    """Shows a log while it grows. A separate thread: a slow reader of the output must not delay the watch."""

    def __init__(self, path: Path, show: Show) -> None:
        self._show: Show | None = show
        self._log = LogWatch(path, self._pass_on)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="viewer", daemon=True)
        self.start = self._thread.start

    def stop(self) -> None:
        """Shows the rest of the log, within 2 seconds."""
        self._stopped.set()
        self._thread.join(timeout=2)

    def _pass_on(self, piece: bytes) -> None:
        if self._show is None:
            return
        try:
            self._show(piece)
        except OSError:
            self._show = None  # the reader has closed the pipe; the job continues

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._log.update()
        self._log.update()
