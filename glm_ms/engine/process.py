"""The process of a run: log levels of its libraries, exit status of a failed rank.

GLM_MS_VERBOSE=1 in the environment shows all logs. Importing this module changes nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from glm_ms.settings.errors import SettingsError

Say = Callable[[str], None]  # takes a line for the user


def is_verbose() -> bool:
    """Whether the user wants to see the logs of MindSpore and MindFormers."""
    return os.environ.get("GLM_MS_VERBOSE", "0") != "0"


@contextmanager
def quiet_imports(log_folder: str) -> Iterator[None]:
    """Imports mindspore and mindformers without their warnings; for the start of a program.

    MindFormers opens its log files below `log_folder` when it is imported.
    """
    os.environ["LOCAL_DEFAULT_PATH"] = log_folder
    if is_verbose():
        yield
        return
    os.environ.setdefault("GLOG_v", "3")  # MindSpore reads it once, on import: errors only
    with no_warnings():  # MindFormers warns of models whose packages are not installed
        yield


@contextmanager
def no_warnings() -> Iterator[None]:
    """Suppresses all log lines below an error."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def hidden_stdout() -> Iterator[Callable[[], None]]:
    """Discards standard output until the block ends or the yielded function is called."""
    with ExitStack() as stack:
        if not is_verbose():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield stack.close


def end_process_after(error: BaseException) -> None:
    """Ends the process of a failed rank, or of a run that was interrupted, when Python exits, with the exit status of
    run_glm.py.

    As the last handler registered it runs before MindSpore's own, which waits for the other ranks.
    """
    status = {SettingsError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        status = error.code
    atexit.register(_end_process, status)


def _end_process(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a pipe that was closed
            continue
    os._exit(status)
