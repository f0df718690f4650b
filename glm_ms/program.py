"""How every program of the project ends: exit statuses of signals, closed pipes and full disks.

Nothing that takes time is imported here: a signal may come at any moment.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from glm_ms import spelling

INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE
_ENDING = (signal.SIGINT, signal.SIGTERM)
_WAKE_UP = signal.SIGURG  # by default ignored, and of no use without sockets
_GRACE = 30.0  # seconds


def program(main: Callable[..., int]) -> Callable[..., int]:
    """Decorates the main function of a program, which returns an exit status.

    * SIGINT: the line "interrupted" and status 130. SIGTERM: status 143, after all `finally` blocks.
    * A reader that closes the output (`| head`): status 141, no message.
    * An OSError that `main` does not catch, such as a full disk behind standard output: its text and status 1.
    * A warning is one line, without its place in the code.
    * A character that the encoding of the terminal lacks is replaced; it never ends a program.
    """

    @functools.wraps(main)
    def run(*arguments: Any) -> int:
        handler = _end_on_sigterm()
        _replace_characters()
        try:
            try:
                with spelling.of_program(), _plain_warnings():
                    return main(*arguments)
            finally:
                sys.stdout.flush()  # also after SystemExit, which argparse raises
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return INTERRUPTED
        except BrokenPipeError:
            _discard_output()
            return CLOSED_PIPE
        except OSError as error:
            _discard_output()
            sys.stderr.write(f"error: {error}\n")
            return 1
        finally:
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)

    return run


@contextmanager
def signal_thread() -> Iterator[Callable[[], None]]:
    """A thread receives SIGINT and SIGTERM while the block runs, so that handlers that libraries install never run.

    Those of MindSpore turn SIGINT into SIGTERM, and a terminated training into a finished one. At first a signal ends
    the process at once, with the status of `program`: an exception in the middle of an import makes libraries abort.
    After a call of the function that this yields, it raises KeyboardInterrupt or SystemExit in the main thread, as
    handlers of Python do. A second signal ends the process at once; so does the first one if the main thread has not
    ended it after 30 seconds, because libraries may compile for minutes, or wait for a rank that is lost. Outside of
    the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    imported, ended = threading.Event(), threading.Event()
    received: list[int] = []
    main = threading.get_ident()

    def receive() -> None:
        number = signal.sigwait(_ENDING)
        if imported.is_set() and not ended.is_set():
            received.append(number)
            signal.pthread_kill(main, _WAKE_UP)
            signal.sigtimedwait(_ENDING, _GRACE)
        if not ended.is_set():
            if number == signal.SIGINT:
                os.write(2, b"interrupted\n")
            os._exit(128 + number)

    def end(_: int, frame: FrameType | None) -> None:
        if received == [signal.SIGINT]:
            raise KeyboardInterrupt
        if received:
            exit_by_signal(received[0], frame)

    # Threads and processes that are started later inherit the mask.
    mask, handler = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING), signal.signal(_WAKE_UP, end)
    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield imported.set
    finally:
        signal.signal(_WAKE_UP, handler)
        ended.set()
        signal.pthread_kill(thread.ident or 0, signal.SIGTERM)
        thread.join()
        restore_signal_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def library_imports() -> Iterator[None]:
    """For the block in which a program imports MindSpore: the garbage collector rests, and skips from then on all
    objects that are there at the end of the block.

    These are about a million that live to the end. At the end of the process Python searches them for garbage several
    times, which takes a second. Objects that are made later are collected as ever. If MindSpore is there already, this
    does nothing.
    """
    if "mindspore" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def restore_signal_handlers() -> None:
    """Interrupt raises KeyboardInterrupt, termination SystemExit(143). Acts in the main thread only.

    MindSpore's data pipeline installs its own handlers when it starts: with them a terminated training exits with
    status 0, as if it had finished.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, exit_by_signal)


def command_name(otherwise: str) -> str:
    """The command that the user typed, for usage messages: `glm-ms eval`, or `otherwise`."""
    return sys.argv[0] if sys.argv[0].startswith("glm-ms ") else otherwise


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A warning is a line for the user, without its place in the code."""
    before, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _end_on_sigterm() -> Any:
    """Installs a handler in place of the default; returns that, or None if nothing was replaced."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None
    return signal.signal(signal.SIGTERM, exit_by_signal)


def exit_by_signal(number: int, _: FrameType | None) -> NoReturn:
    """Signal handler: SystemExit with the status that a shell reports for a signal."""
    raise SystemExit(128 + number)


def _replace_characters() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a stream that a program has replaced
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Nothing is written at exit: Python would report the same error again."""
    for stream in (sys.stdout, sys.stderr) if isinstance(sys.exc_info()[1], BrokenPipeError) else (sys.stdout,):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):  # a stream without a file
            continue
