"""Outcomes of comparisons, kept in a file for each kind of card and set of versions, so that later starts know them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import FileError, WriteError
from glm_ms.storage.lock import locked
from glm_ms.storage.readers import read_object

Say = Callable[[str], None]
_MACHINE, _OUTCOMES = "machine", "outcomes"


class Outcome(NamedTuple):
    """Whether a kernel agrees with its portable operator, and the difference or the error."""

    agrees: bool
    why: str


# Written before a comparison: what later starts find if the process ends in it.
_ENDED = Outcome(False, "the process ended while they were compared")


def cache_folder() -> Path | None:
    """`glm_ms` in the user's folder of caches, $XDG_CACHE_HOME or ~/.cache; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "glm_ms"
    try:
        return Path.home() / ".cache" / "glm_ms"
    except RuntimeError:
        return None


def file_for(machine: str, folder: Path) -> Path:
    """The file of a kind of card and set of versions."""
    return folder / f"kernels-{re.sub(r'[^A-Za-z0-9._]+', '-', machine)}.json"


def outcomes(
    machine: str, checks: Mapping[str, Callable[[], Outcome]], folder: Path | None, say: Say
) -> dict[str, Outcome]:
    """The outcome of every check, by name. Those in the file of `machine` do not run; the others are added to it.

    Processes that start together wait for the first one, and then read what it has found. A process that is killed in
    a check, or that a kernel ends, leaves the outcome that the kernel does not agree. A folder that cannot be used, or
    a file that is damaged, costs the comparison; `say` takes a line about it.
    """
    if folder is None:
        return {name: check() for name, check in checks.items()}
    file = _File(file_for(machine, folder), machine, say)
    with ExitStack() as stack:
        file.open(stack)
        known = file.read()
        for name, check in checks.items():
            if name in known:
                continue
            file.write({**known, name: _ENDED})
            try:
                known[name] = check()
            finally:  # also if the user ends it
                file.write(known)
    return {name: known[name] for name in checks}


class _File:
    """The file of a machine. After the first error of the disk it is not used any more."""

    def __init__(self, path: Path, machine: str, say: Say) -> None:
        self.path, self.machine, self.say = path, machine, say
        self.usable = True

    def open(self, stack: ExitStack) -> None:
        """Locks the file until `stack` ends."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = locked(self.path.with_suffix(".lock"), on_wait=self._wait)
            no_locks = stack.enter_context(lock)
        except OSError as error:
            self._give_up(error)
        else:
            # Without locks the mark of a comparison that runs now could be taken for that of one that ended.
            if no_locks is not None:
                self._give_up(no_locks)

    def read(self) -> dict[str, Outcome]:
        """What the file says; empty if it is missing, damaged or of another machine."""
        if not self.usable or not self.path.exists():
            return {}
        try:
            content = read_object(self.path)
            found = content[_OUTCOMES]
            if content[_MACHINE] != self.machine:
                return {}
            return {name: _outcome(value) for name, value in found.items()}
        except (FileError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error if isinstance(error, FileError) else f"{self.path}: is not a file of this program"
            self.say(f"{reason}; the kernels are compared again")
            return {}

    def write(self, known: Mapping[str, Outcome]) -> None:
        if not self.usable:
            return
        content = {_MACHINE: self.machine, _OUTCOMES: {name: value._asdict() for name, value in known.items()}}
        try:
            replace_text(self.path, json.dumps(content, indent=1) + "\n")
        except WriteError as error:
            self._give_up(error)

    def _wait(self) -> None:
        self.say("another process compares the kernels of this card; waiting for what it finds")

    def _give_up(self, error: Exception) -> None:
        self.usable = False
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        self.say(f"{self.path}: cannot be used ({reason}); the next start compares the kernels again")


def _outcome(value: Mapping[str, object]) -> Outcome:
    agrees, why = value["agrees"], value["why"]
    if not isinstance(agrees, bool) or not isinstance(why, str):
        raise ValueError(value)
    return Outcome(agrees, why)
