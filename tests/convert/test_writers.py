"""Output is whole or absent, whatever happens, and takes nothing else with it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm_ms import GLMConfig
from glm_ms.convert import writers
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.reader import open_checkpoint
from glm_ms.storage.atomic import atomic_output
from glm_ms.storage.errors import CheckpointError

OUTPUTS = ("out.ckpt", "out.safetensors", "out")


@pytest.fixture
def source(golden: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of its own, beside which nothing else lies."""
    (tmp_path / "work").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / "models" / "glm2_tiny" / name, folder)
    return folder


@pytest.fixture
def work(source: Path) -> Path:
    return source.parent / "work"


def _content(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", OUTPUTS)
def test_failure_in_the_middle_leaves_nothing(source: Path, work: Path, name: str) -> None:
    conversion = plan_conversion(source, work / name)
    done = []

    def fail(tensor: str, size: int) -> None:
        done.append(tensor)
        if len(done) == 5:
            raise CheckpointError("stop")

    with pytest.raises(CheckpointError, match="stop"):
        conversion.run(fail)
    assert list(work.iterdir()) == []


KILL = """
import os, signal, sys
from glm_ms.convert.conversion import plan_conversion
done = []
def kill(name, size):
    done.append(name)
    if len(done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
plan_conversion(sys.argv[1], sys.argv[2], overwrite=True).run(kill)
"""


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_killed_conversion_leaves_no_output(
    repository: Path, source: Path, work: Path, convert, name: str, existing: bool
) -> None:
    output = work / name
    if existing:
        before = _content(convert(source, output, dtype="float16"))
    done = subprocess.run(
        [sys.executable, "-c", KILL, source, output], cwd=repository, timeout=60, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    if existing:
        assert _content(output) == before
    else:
        assert not output.exists()
    hidden = [item for item in work.iterdir() if item != output]
    assert [item.name.endswith(".partial") for item in hidden] == [True]
    convert(source, output, overwrite=True)
    assert list(work.iterdir()) == [output]  # the next run clears what the killed one left


def test_partial_output_of_a_living_writer_is_left_alone(work: Path) -> None:
    path = work / "out.ckpt"
    with atomic_output(path) as first:
        first.write_bytes(b"first")
        with atomic_output(path) as second:
            second.write_bytes(b"second")
        assert first.read_bytes() == b"first"
        assert path.read_bytes() == b"second"


@pytest.mark.parametrize("name", OUTPUTS)
def test_existing_output_is_kept_without_overwrite(source: Path, work: Path, convert, name: str) -> None:
    before = _content(convert(source, work / name, dtype="float16"))
    with pytest.raises(CheckpointError, match="exists already"):
        plan_conversion(source, work / name)
    assert _content(work / name) == before
    convert(source, work / name, overwrite=True)
    assert _content(work / name) != before
    assert list(work.iterdir()) == [work / name]


def test_overwriting_removes_the_shards_of_before(source: Path, work: Path, convert) -> None:
    convert(source, work / "out", max_shard_size=50_000)
    assert (work / "out" / "model.safetensors.index.json").exists()
    convert(source, work / "out", overwrite=True)
    assert sorted(_content(work / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("relative", ["notes.txt", "config.json/notes.txt"])
def test_folder_of_other_things_is_never_replaced(source: Path, work: Path, relative: str) -> None:
    file = work / relative
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(CheckpointError, match="does not look like a checkpoint"):
        plan_conversion(source, work, overwrite=True)
    assert file.read_text() == "precious"


def test_input_is_never_replaced(source: Path, tmp_path: Path) -> None:
    for output in (source, source / "model.safetensors"):
        with pytest.raises(CheckpointError, match="would replace the input"):
            plan_conversion(source, output, overwrite=True)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="would replace the input"):
        plan_conversion(source, tmp_path / "link", overwrite=True)


def test_file_in_place_of_a_folder_and_back(source: Path, work: Path) -> None:
    (work / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, but a folder is to be written"):
        plan_conversion(source, work / "file", overwrite=True)
    (work / "folder.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, but a file is to be written"):
        plan_conversion(source, work / "folder.ckpt", overwrite=True)


def test_missing_folders_are_made(source: Path, work: Path) -> None:
    plan_conversion(source, work / "no" / "such" / "out.ckpt").run()
    assert (work / "no" / "such" / "out.ckpt").is_file()
    with pytest.raises(CheckpointError, match=r"out\.ckpt is a file, not a folder"):
        plan_conversion(source, work / "no" / "such" / "out.ckpt" / "x.ckpt")
    with pytest.raises(CheckpointError, match="too long for a path"):
        plan_conversion(source, work / ("x" * 300) / "x.ckpt")


@pytest.mark.parametrize("name", OUTPUTS)
def test_disk_that_fills_up(source: Path, work: Path, name: str) -> None:
    conversion = plan_conversion(source, work / name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # writes beyond it fail as on a full disk
    try:
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written"):
            conversion.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(work.iterdir()) == []


def test_disk_that_is_too_small_is_noticed_first(source: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(writers.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, 0\.00 GB are free"):
        plan_conversion(source, work / "out.ckpt").run()
    assert list(work.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_write_permission(source: Path, work: Path) -> None:
    work.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            plan_conversion(source, work / "out.ckpt").run()
    finally:
        work.chmod(0o700)


@pytest.mark.parametrize("name", OUTPUTS)
def test_overflow_names_the_tensor_and_leaves_nothing(source: Path, work: Path, name: str) -> None:
    config = GLMConfig.from_pretrained(source)
    with open_checkpoint(source) as reader:
        weights = {tensor: reader.read(tensor) for tensor in reader.names()}
    weights["transformer.output_layer.weight"][3, 4] = 1e6
    shapes = {tensor: array.shape for tensor, array in weights.items()}
    shutil.rmtree(source)
    writers.write_hf_folder(source, config, shapes, "float32", weights.items())
    with pytest.raises(CheckpointError, match=r"transformer\.output_layer\.weight: value 1e\+06 overflows float16"):
        plan_conversion(source, work / name, dtype="float16").run()
    assert list(work.iterdir()) == []


def test_writer_refuses_other_parameters(work: Path) -> None:
    shapes = {"a": (2,), "b": (3,)}
    a, b = ("a", np.ones(2, np.float32)), ("b", np.ones(3, np.float32))
    wrong = ([a], [b, a], [a, b, b], [a, ("b", np.ones(2, np.float32))], [a, ("b", np.ones(3))], [])
    for parameters in wrong:
        for name in ("out.ckpt", "out.safetensors"):
            with pytest.raises(CheckpointError, match=r"expected|more arrays"):
                writers.write_file(work / name, shapes, "float32", parameters)
    with pytest.raises(CheckpointError, match="must end in"):
        writers.write_file(work / "out.bin", shapes, "float32", [a, b])
    with pytest.raises(CheckpointError, match="must be one of"):
        writers.write_file(work / "out.ckpt", shapes, "int64", [a, b])
    assert list(work.iterdir()) == []


def test_symbolic_link_is_followed(source: Path, work: Path, convert) -> None:
    real = convert(source, work / "real", dtype="float16")
    (work / "link").symlink_to(real)
    convert(source, work / "link", overwrite=True)
    assert (work / "link").is_symlink()
    assert open_checkpoint(real).dtype("transformer.output_layer.weight") == "float32"
