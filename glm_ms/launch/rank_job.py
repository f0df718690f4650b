"""A job of several ranks on this machine: waits, shows one rank live, ends all when one fails, and says why."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_ms.launch.processes import Interrupts, descendants, kill_descendants, send
from glm_ms.launch.rank_logs import LogWatch, ends_with_traceback, reason_in

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # between the request to end and SIGKILL
# The scheduler of msrun runs the same script as the ranks: where all fail, a rank's word is worth more.
SCHEDULER_PATIENCE = 5.0
# A rank that has written its traceback and hangs while it ends is the cause of a failure that follows.
_HANGING_SECONDS = 120.0
_SCHEDULER_END_SECONDS = 60.0


@dataclass(frozen=True)
class Member:
    """One process of a job.

    Attributes:
        name: "rank 3", or "scheduler".
        log: file with what it writes to its standard streams.
        is_rank: False for the scheduler.
    """

    name: str
    log: Path
    is_rank: bool = True


class RankJob:
    """Processes that have been started by this one, or that it has adopted.

    Args:
        members: process -> what it is.
        interrupts: the signals of this process.
        say: takes lines for the user.
        show: takes what the first rank of this machine writes, live.
        alone: whether all ranks of the job are on this machine.
    """

    def __init__(
        self,
        members: Mapping[int, Member],
        interrupts: Interrupts,
        say: Callable[[str], None],
        show: Callable[[bytes], None],
        alone: bool = True,
    ) -> None:
        self._members = dict(members)
        self._interrupts, self._say, self._alone = interrupts, say, alone
        self._running = set(members)
        self._ends: dict[
            int, tuple[float, int]
        ] = {}  # process -> moment, exit status (of a signal: negative)
        self._logs = {process: LogWatch(member.log) for process, member in members.items()}
        shown = next(member.log for member in members.values() if member.is_rank)
        self._viewer = _Viewer(shown, show)

    def wait(self) -> int:
        """Waits for the end of all ranks; afterwards no process of the job is left.

        Returns:
            0 when all ranks succeeded; else the exit status of the one that failed first, 128 + N for signal N;
            130, 143 or 129 when this process was interrupted.
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
        """Reads the logs, then notes who has ended: a rank's traceback is known before its end."""
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
        """Processes that have failed, in the order in which they ended."""
        return [p for p, (_, status) in self._ends.items() if status and self._members[p].is_rank == ranks]

    def _has_failed(self) -> bool:
        if self._bad_ends(ranks=True):
            return True
        schedulers = self._bad_ends(ranks=False)
        if not self._ranks_running():
            # With all ranks here the job has succeeded, whatever becomes of the scheduler.
            return bool(schedulers) and not self._alone
        late = time.monotonic() - SCHEDULER_PATIENCE
        return any(self._ends[process][0] < late for process in schedulers)

    def _wait_for_scheduler(self) -> None:
        """The ranks of this machine have succeeded. The scheduler ends after the ranks of all machines."""
        begin, told = time.monotonic(), False
        while self._running and not self._interrupts.received:
            self._look()
            waited = time.monotonic() - begin
            if self._alone and waited > _SCHEDULER_END_SECONDS:
                self._say(
                    f"note: all ranks have succeeded; the scheduler did not end in {waited:.0f} s and is ended"
                )
                return
            if not self._alone and waited > 10 and not told:
                self._say("the ranks of this server have succeeded; waiting for those of the other servers")
                told = True
            time.sleep(POLL_SECONDS)

    def _succeeded(self) -> int:
        self._viewer.stop()
        for process in self._bad_ends(ranks=False):
            member = self._members[process]
            self._say(f"note: all ranks have succeeded, but {self._told(process)}, log: {member.log}")
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
        self._say(f"{member.name} says last:\n{reason}\n" if reason else f"{member.name} has said nothing.\n")
        also = ", ".join(self._told(process) for process in others if process != cause)
        if also:
            self._say(f"after it: {also}")
        self._say(f"error: {self._told(cause)}, log: {member.log}")
        status = self._ends[cause][1] if cause in self._ends else 1
        return _shell_status(status) or 1

    def _cause(self) -> int:
        """The process that failed first. A failure begins with the traceback, if there is one: the ranks that wait
        for the failed one may notice and end before it has ended itself."""
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

    def _told(self, process: int) -> str:
        name = self._members[process].name
        if process not in self._ends:
            return f"{name} failed and did not end by itself"
        status = self._ends[process][1]
        if status >= 0:
            return f"{name} failed (exit status {status})"
        hint = (
            "; by hand, or by the system for want of memory: see dmesg" if -status == signal.SIGKILL else ""
        )
        return f"{name} was ended by signal {-status} ({signal.Signals(-status).name}{hint})"

    def _interrupted(self) -> int:
        number = self._interrupts.received
        self._say(f"\n{signal.Signals(number).name}: ending all ranks")
        self._end_all(number)
        self._viewer.stop()
        logs = next(iter(self._members.values())).log
        self._say(f"interrupted; logs: {logs.parent}")
        return 128 + number

    def _end_all(self, number: int) -> None:
        """Asks everything that runs to end, then makes it."""
        # Known now: once a rank has ended its own children cannot be told from others.
        for process in self._running:
            send(process, number)
        deadline = time.monotonic() + GRACE_SECONDS
        signals = self._interrupts.count
        ends = dict(self._ends)
        while self._running and time.monotonic() < deadline and self._interrupts.count == signals:
            self._look()
            time.sleep(POLL_SECONDS / 2)
        self._ends = ends  # what ended now did not fail
        left = kill_descendants()
        if left:
            self._say(f"warning: these processes cannot be ended: {', '.join(map(str, left))}")


def end_started() -> None:
    """Ends everything that this process has started, before there is a job."""
    for process in descendants(os.getpid()):
        send(process, signal.SIGTERM)
    kill_descendants()


def _shell_status(status: int) -> int:
    return 128 - status if status < 0 else status


class _Viewer:
    """Shows a log while it grows. A thread of its own: whoever reads slowly must not delay the watch."""

    def __init__(self, path: Path, show: Callable[[bytes], None]) -> None:
        self._show: Callable[[bytes], None] | None = show
        self._log = LogWatch(path, self._pass_on)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="viewer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Shows the rest, unless that takes longer than a moment."""
        self._stopped.set()
        self._thread.join(timeout=2)

    def _pass_on(self, piece: bytes) -> None:
        if self._show is None:
            return
        try:
            self._show(piece)
        except OSError:
            self._show = None  # the reader has gone; the job goes on

    def _run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._log.update()
        self._log.update()
