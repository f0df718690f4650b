"""Runs msrun in this process and reports the processes that it starts; a separate program, for `launch.msrun`.

Its arguments are a file descriptor, which receives a line for each process (its id, MS_ROLE and RANK_ID, "-" if not
set), and the command line of msrun. msrun does not report them. When it returns, Python also waits for its processes
that have ended already and drops their exit statuses. The subclass of Popen here prevents both.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from typing import Any, NoReturn


def start(descriptor: int, script: str, arguments: list[str]) -> NoReturn:
    """Runs msrun with arguments, and ends this process with its exit status."""
    kept: list[subprocess.Popen] = []  # Python waits for a process when its object is deleted

    class ReportedProcess(subprocess.Popen):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            kept.append(self)
            role, rank = (os.environ.get(name, "-") for name in ("MS_ROLE", "RANK_ID"))
            os.write(descriptor, f"{self.pid} {role} {rank}\n".encode())

    subprocess.Popen = ReportedProcess  # type: ignore[misc]
    sys.argv = [script, *arguments]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # before `kept` is deleted


if __name__ == "__main__":
    start(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
