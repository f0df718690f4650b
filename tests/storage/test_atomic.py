"""Small files that are old or new, never half, and locks; `tests/convert/test_writers.py` has checkpoints."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from glm_ms.storage import lock
from glm_ms.storage.atomic import atomic_output, check_target, remove_leftovers, replace_bytes, replace_text, staged
from glm_ms.storage.errors import CheckpointError, FileError, WriteError


def test_replaces_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "甲\r\n")
    assert path.read_bytes() == "甲\r\n".encode()
    replace_text(path, "b")
    assert path.read_bytes() == b"b"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    replace_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match=r"a: cannot be written: No space left .*; free space .* MB are left"):
        replace_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("")
    with pytest.raises(OSError, match="directory"):
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a" / "precious").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc, which names open files")
def test_missing_folders_are_made_or_the_error_names_the_output(tmp_path: Path) -> None:
    replace_text(tmp_path / "a" / "b" / "c", "text", parents=True)
    assert (tmp_path / "a" / "b" / "c").read_text() == "text"
    absent = Path("/proc/absent/file")
    message = f"{absent}: cannot be written: No such file or directory; its folder does not exist"
    with pytest.raises(CheckpointError, match=message), atomic_output(absent, parents=True):
        pass


def test_contents_are_on_the_disk_before_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name))
    with staged(tmp_path / "out", folder=True) as work:
        (work / "rank_0").mkdir()
        (work / "rank_0" / "a").write_text("a")
    assert synced == ["a", "rank_0", work.name]


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".a.0123.partial"
    leftover.mkdir()
    (leftover / "a").write_text("half")
    replace_text(tmp_path / "a", "new")
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_staged_folder_replaces_a_folder(tmp_path: Path) -> None:
    for text in ("1", "2"):
        with staged(tmp_path / "a", folder=True) as work:
            (work / text).write_text(text)
    assert [item.name for item in (tmp_path / "a").iterdir()] == ["2"]
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_any_name_go_and_the_only_copy_returns(tmp_path: Path) -> None:
    for name in (".a.01.partial", ".b.02.partial", ".b.02.replaced", ".c.03.replaced", "c", ".d.replaced", ".lock"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".e.04.partial").symlink_to(tmp_path / "elsewhere")
    with lock.locked(tmp_path / ".a.01.partial", folder=True):
        remove_leftovers(tmp_path)
        assert (tmp_path / ".a.01.partial").exists()  # its writer is alive
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".d.replaced", ".e.04.partial", ".lock", "b", "c", "elsewhere",
    ]  # fmt: skip


def test_lock_refuses_or_waits(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waiting, entered = threading.Event(), []

    def second() -> None:
        with lock.locked(path, on_wait=waiting.set) as no_locks:
            entered.append(no_locks)

    with lock.locked(path) as no_locks:
        assert no_locks is None
        with pytest.raises(BlockingIOError):
            lock.locked(path).__enter__()
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        assert not entered
    thread.join(10)
    assert entered == [None]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock.locked(tmp_path / "lock") as reason:
        assert reason is not None
        assert reason.errno == errno.ENOLCK
    (tmp_path / ".a.0123.partial").mkdir()  # may belong to a living writer
    replace_text(tmp_path / "a", "new")
    assert (tmp_path / ".a.0123.partial").exists()


def test_a_link_to_itself_is_no_target(tmp_path: Path) -> None:
    for name, target in (("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(FileError, match="a: is a symbolic link to itself"):
        check_target(tmp_path / "a", overwrite=False)
    (tmp_path / "c").symlink_to("new")
    check_target(tmp_path / "c", overwrite=False)
