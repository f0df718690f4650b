"""Processes of subjects: one call at a time, all others are stopped meanwhile."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.bench.subjects import OURS, SUBJECTS, Setup

WORKER = Path(__file__).with_name("worker.py")
_SECONDS_TO_END = 10


class BenchError(Exception):
    """A measurement cannot be made; the message says why and what to do."""


class NotMeasuredError(BenchError):
    """One subject cannot do what was asked, or has failed; others still can."""


class Worker:
    """The process of one subject. It is stopped (SIGSTOP) except during a call, so that it takes no time of others.

    Args:
        subject: key of `SUBJECTS`.
        weights: type of the weights.
        python: interpreter.
        cores: numbers of the cores that it may use.

    Attributes:
        peak_memory: largest resident size at the last call, in bytes.
        version: of the programs.
    """

    def __init__(self, subject: str, weights: str, python: str, cores: Sequence[int]) -> None:
        self.subject, self.weights, self.python = subject, weights, python
        self.peak_memory, self.version = 0, ""
        command = [python, str(WORKER), subject, ",".join(map(str, cores))]
        # Libraries count threads by these variables before they look at the cores.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(len(cores)))
        environment = {**os.environ, "GLOG_v": "3", "PYTHONUNBUFFERED": "1", **threads}
        if subject != OURS:
            environment.pop("PYTHONPATH", None)  # packages there are for another interpreter
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115, not a pipe, which would fill
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.messages, text=True,
                encoding="utf-8", env=environment, start_new_session=True
            )  # fmt: skip
        except OSError as error:
            self.messages.close()
            raise BenchError(f"{python}: cannot be run: {error.strerror}; give a Python (--peer-python)") from None

    @property
    def name(self) -> str:
        return f"{self.subject}:{self.weights}"

    def call(self, method: str, **arguments: Any) -> Any:
        """The value that a method of the subject returns.

        Raises:
            NotMeasuredError: the method has failed, or the process has ended.
        """
        if "setup" in arguments:
            arguments["setup"] = asdict(arguments["setup"])
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self._signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except KeyboardInterrupt:  # it would work to the end of the call
            self.process.kill()
            raise
        if not line:
            raise NotMeasuredError(f"{self.name}: {self._end_of_process()}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise NotMeasuredError(f"{self.name}: {self._advice(answer)}")
        self.peak_memory = answer["peak_memory"]
        value = answer["value"]
        if isinstance(value, dict) and "float32" in value:
            return np.frombuffer(base64.b64decode(value["float32"]), np.float32)
        return value

    def build(self, setup: Setup) -> None:
        """Loads the weights."""
        self.version = self.call("build", setup=setup)["version"]

    def end(self) -> None:
        """Ends the process."""
        with suppress(OSError):
            self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.messages.close()

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def _end_of_process(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed by the system, most likely for lack of memory; measure fewer programs or a smaller geometry"
        self.messages.seek(0)
        last = (self.messages.read().decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        return f"its process ended with status {code}: {last}"

    def _advice(self, answer: dict[str, str]) -> str:
        if answer["kind"] not in ("ModuleNotFoundError", "ImportError"):
            return answer["error"]
        packages = " ".join(SUBJECTS[self.subject].packages)
        return f"{answer['error']}; {self.python} needs the packages {packages} (--peer-python chooses another Python)"


def default_python(subject: str, peer_python: str | None) -> str:
    """The interpreter of a subject."""
    return sys.executable if subject == OURS or peer_python is None else peer_python
