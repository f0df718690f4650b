"""The manifest of a checkpoint, the lock of an output folder."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from glm_ms.storage.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from glm_ms.engine.checkpoints.manifest import write_manifest

    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    write_manifest(tmp_path, 7, (1, 12), {"seed": 0, "betas": [0.9, 0.95]}, None, "CPU")
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    from glm_ms.engine.checkpoints.manifest import read_manifest, verify_files
    from glm_ms.storage.integrity import json_sha256

    manifest = read_manifest(folder)
    assert (manifest.step, manifest.epoch, manifest.row) == (7, 1, 12)
    assert manifest.config_sha256 == json_sha256({"betas": [0.9, 0.95], "seed": 0})
    assert {name: each["bytes"] for name, each in manifest.files.items()} == {"a": 3, "b": 3}
    verify_files(folder, manifest)


def test_a_later_layout_is_named(folder: Path) -> None:
    from glm_ms.engine.checkpoints.manifest import read_manifest
    from glm_ms.storage.integrity import json_sha256

    values = json.loads((folder / "manifest.json").read_text())
    values["format_version"] = 2
    del values["manifest_sha256"]
    values["manifest_sha256"] = json_sha256(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"layout 2, this version .* reads layout 1"):
        read_manifest(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    from glm_ms.engine.checkpoints.manifest import read_manifest

    with pytest.raises(CheckpointError, match=r"not a training checkpoint \(manifest.json is missing\)"):
        read_manifest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"only weights .*--load_checkpoint"):
            read_manifest(path)


def test_runs_of_an_earlier_version_resume_on_weights_in_folders_of_ranks(tmp_path: Path) -> None:
    from glm_ms.engine.checkpoints.manifest import write_manifest
    from glm_ms.engine.checkpoints.resume import check_checkpoint
    from glm_ms.storage.fingerprint import weights_fingerprint

    folder, base = tmp_path / "step_00000007", tmp_path / "base"
    for path in (folder, base / "rank_0"):
        path.mkdir(parents=True)
    write_manifest(folder, 7, (1, 12), {"seed": 0, "base_weights": weights_fingerprint(base)}, None, "CPU")
    (base / "rank_0" / "glm3.ckpt").write_bytes(b"weights")
    position = {"seed": 0, "base_weights": weights_fingerprint(base)}
    assert check_checkpoint(folder, position).step == 7
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        check_checkpoint(folder, {**position, "seed": 1})


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    from glm_ms.storage.lock import run_lock

    said: list[str] = []
    second = run_lock(tmp_path, said.append)
    with run_lock(tmp_path, said.append), pytest.raises(CheckpointError, match="another run is training"):
        second.__enter__()
    with run_lock(tmp_path, said.append):
        assert not said


def test_no_locks_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm_ms.storage import lock

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock.run_lock(tmp_path, said.append):
        assert len(said) == 1
    assert "no locks (No locks available)" in said[0]
