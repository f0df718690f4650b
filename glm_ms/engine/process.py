"""The process of a run: log levels of its libraries, signal handlers, exit status of a failed rank.

GLM_MS_VERBOSE=1 in the environment shows all logs. Importing this module changes nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from types import FrameType
from typing import NoReturn

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


def restore_signal_handlers() -> None:
    """Interrupt raises KeyboardInterrupt, termination SystemExit(143). Acts in the main thread only.

    MindSpore's data pipeline installs its own handlers when it is imported and again when it starts: with them a
    terminated training exits with status 0, as if it had finished.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def end_process_after(error: BaseException) -> None:
    """Ends the process of a failed rank when Python exits, with the exit status of run_glm.py.

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
