"""How programs end: signals, closed pipes, full disks, terminals without a character."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from engine_helpers import REPOSITORY

from glm_ms.program import program, signal_thread

GLM_MS = "import sys; from glm_ms.commands import main; sys.exit(main())"
WAITING = """
import signal, sys, time
from glm_ms.program import program

@program
def main(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

sys.exit(main(None))
"""


def start(text: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments], env=environment, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", **options
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["configs"]])
def test_a_closed_output(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(GLM_MS, *arguments, stdout=writer)
    os.close(writer)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["configs"]])
def test_an_output_on_a_full_disk(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = start(GLM_MS, *arguments, stdout=full)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said == "error: [Errno 28] No space left on device\n"


def test_a_terminal_without_the_character() -> None:
    process = start(GLM_MS, "finetune", "--help_keys", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert "hidden_size" in shown


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_signals(number: signal.Signals, status: int, said: str) -> None:
    process = start(WAITING, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("cleaned up\n", said)
    assert process.returncode == status


THREAD = """
import signal, sys, time
from glm_ms.program import program, signal_thread

@program
def main(phase):
    with signal_thread() as imported:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: print("of a library"))
        try:
            if phase != "import":
                imported()
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            if phase != "stuck":
                raise
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)

sys.exit(main(sys.argv[1]))
"""


@pytest.mark.parametrize(("phase", "shown"), [("import", ""), ("run", "cleaned up\n")])
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_handlers_of_libraries_do_not_run(
    phase: str, shown: str, number: signal.Signals, status: int, said: str
) -> None:
    process = start(THREAD, phase, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60) == (shown, said)
    assert process.returncode == status


def test_a_second_signal_ends_the_program_at_once() -> None:
    process = start(THREAD, "stuck", stdout=subprocess.PIPE)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


def test_the_signal_thread_leaves_nothing() -> None:
    before = [signal.pthread_sigmask(signal.SIG_BLOCK, []), threading.active_count(), signal.getsignal(signal.SIGURG)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signal_thread() as imported:
        imported()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    after = [signal.pthread_sigmask(signal.SIG_BLOCK, []), threading.active_count(), signal.getsignal(signal.SIGURG)]
    assert after == before


def test_the_handler_of_a_caller_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert program(lambda: 3)() == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_usage_names_the_command() -> None:
    process = start(GLM_MS, "eval", "--confg", "x", stdout=subprocess.PIPE)
    assert "Try: glm-ms eval --help" in process.communicate(timeout=60)[1]
