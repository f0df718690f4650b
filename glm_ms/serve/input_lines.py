"""Messages that a user types or that a pipe delivers."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CTRL_C = b"\x03"
BLOCK = '"""'


class InputLines:
    """Standard input, a message at a time.

    A message is a line; or all lines from one that begins with three quotation marks to one that ends with them. In a
    terminal lines can be edited, and text that is pasted is one message, line breaks included.

    Args:
        say: takes a line about input that cannot be read.

    Attributes:
        interactive: whether input and output are a terminal.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.interactive:
            with suppress(ImportError):  # Python may be built without it
                import readline

                readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self, prompt: str) -> str:
        """The next message.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: Ctrl-C.
        """
        if self.interactive and threading.current_thread() is threading.main_thread():
            # The graphs of MindSpore leave a handler behind that ends the process.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        text = self._line(prompt)
        if not text.lstrip().startswith(BLOCK):
            return text
        lines = [text.lstrip()[len(BLOCK) :]]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(self._line("... "))
        lines[-1] = lines[-1].rstrip()[: -len(BLOCK)]
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        while True:
            try:
                if self.interactive:
                    return input(prompt)
                line = sys.stdin.buffer.readline()
                if not line:
                    raise EOFError
                return line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                self._say("this line is not UTF-8; it is left out")

    @contextmanager
    def stop_key(self) -> Iterator[Callable[[], bool]]:
        """A function that tells, while the block runs, whether Ctrl-C has been pressed in the terminal.

        Ctrl-C is a key here and no signal: graphs of MindSpore turn SIGINT into the end of the process, whatever
        handler Python has. Other keys that are pressed meanwhile have no effect.
        """
        if not self.interactive:
            yield lambda: False
            return
        terminal = sys.stdin.fileno()
        before, keys = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
        keys[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)

        def pressed() -> bool:
            while select.select([terminal], [], [], 0)[0]:
                typed = os.read(terminal, 1024)
                if not typed or _CTRL_C in typed:  # nothing: the terminal has been closed
                    return True
            return False

        termios.tcsetattr(terminal, termios.TCSADRAIN, keys)
        try:
            yield pressed
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
