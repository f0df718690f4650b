"""Ctrl-C and SIGTERM end a run as they end any Python program.

MindSpore's data pipeline puts handlers of its own in their place when it is imported and again when it starts:
with them a terminated training exits with status 0, as if it had finished.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn


def restore_signal_handlers() -> None:
    """Interrupt raises KeyboardInterrupt, termination SystemExit(143). Acts in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
