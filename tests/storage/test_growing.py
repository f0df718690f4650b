"""Files that grow: additions whole or absent, also on a full disk; a file that is lost is noticed."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glm_ms.storage.errors import WriteError
from glm_ms.storage.growing import GrowingFile, read_lines


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ('"a"', '"甲\ud800"'):  # half a character
        with GrowingFile(tmp_path / "log") as file:
            file.append_lines(line)
    assert (tmp_path / "log").read_bytes() == '"a"\n"甲\\ud800"\n'.encode()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may exceed 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_addition_that_does_not_fit_is_absent(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "log"
    with GrowingFile(path) as file:
        file.append(b"a" * 60)
        with pytest.raises(WriteError, match=r"log: cannot be written: File too large; raise .*ulimit -f"):
            file.append(b"b" * 60)  # the system takes 40 of them
        file.append(b"c")
    assert path.read_bytes() == b"a" * 60 + b"c"


def test_an_interrupted_addition_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        write(descriptor, content[:1])
        raise KeyboardInterrupt

    with GrowingFile(tmp_path / "log") as file:
        file.append(b"a")
        monkeypatch.setattr("os.write", half)
        with pytest.raises(KeyboardInterrupt):
            file.append(b"bc")
    assert (tmp_path / "log").read_bytes() == b"a"


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replace(folder: Path) -> None:
    rename(folder)
    folder.mkdir()
    (folder / "log").write_text("of another program")


def remove(folder: Path) -> None:
    (folder / "log").unlink()


@pytest.mark.parametrize("change", [rename, replace, remove])
def test_a_lost_file_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with GrowingFile(folder / "log") as file:
        file.append(b"a")
        change(folder)
        for write in (lambda: file.append(b"b"), file.sync):
            with pytest.raises(WriteError, match="run/log: this file, or its folder, has been removed, renamed or"):
                write()


def test_the_reason_of_the_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match=r"no/log: cannot be written: No such file or directory; its folder"):
        GrowingFile(tmp_path / "no" / "log")

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("os.fsync", full)
    with GrowingFile(tmp_path / "log") as file, pytest.raises(WriteError, match="Disk quota exceeded; free space in"):
        file.sync()


def test_lines_are_read_and_damage_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read_lines(path, {}) == ([], [])
    path.write_bytes(b'{"a": 1}\n\0\0\n[1]\n{"a": 2}\r\n\xff\n{"a": "1"}\n{"b": 1}\n{"a"')
    lines, damaged = read_lines(path, {"a": int})
    assert lines == [(b'{"a": 1}\n', {"a": 1}), (b'{"a": 2}\r\n', {"a": 2})]
    assert damaged == [2, 3, 5, 6, 7]  # the last line is half written, not damaged
    path.write_bytes(b'{"a": 1}')
    assert read_lines(path, {}) == ([], [])
