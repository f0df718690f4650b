"""Weights in the memory of their file: the same numbers and checks, and a file that nobody changes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from glm_ms import GLMConfig
from glm_ms.convert.names import expected_shapes
from glm_ms.convert.reader import load_parameters, open_checkpoint
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import describe_files, write_manifest_values

CONFIG = GLMConfig(
    num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=8, num_attention_heads=4,
    multi_query_group_num=2,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of random weights in float32, with its manifest."""
    shapes, generator = expected_shapes(CONFIG), np.random.default_rng(0)
    arrays = (generator.standard_normal(shape, np.float32) for shape in shapes.values())
    made = tmp_path / "checkpoint"
    made.mkdir()
    write_safetensors(made / "model.safetensors", shapes, "float32", arrays, {"format": "pt"})
    write_manifest_values(made, {"format_version": 1, "files": describe_files(made)})
    return made


def load(folder: Path, dtype: str = "float32", mapped: bool = True) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as reader:
        return dict(reader.verified(load_parameters(reader, CONFIG, dtype, mapped=mapped)))


def test_the_numbers_are_those_that_are_read(folder: Path) -> None:
    read, mapped = load(folder, mapped=False), load(folder)
    assert list(read) == list(mapped)
    for name, value in mapped.items():
        assert isinstance(value, np.memmap)
        assert not isinstance(read[name], np.memmap)
        np.testing.assert_array_equal(value, read[name], name)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
def test_no_page_is_in_memory_before_it_is_used(folder: Path) -> None:
    """Although every number has been checked."""

    def resident() -> int:
        parts = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        found = [part for part in parts if str(folder) in part.splitlines()[0]]
        assert found
        return sum(int(re.search(r"^Rss:\s*(\d+)", part, re.M)[1]) << 10 for part in found)

    arrays = load(folder)
    assert resident() == 0
    assert all(np.isfinite(value).all() for value in arrays.values())
    assert resident() >= sum(value.nbytes for value in arrays.values())


def test_another_type_is_converted(folder: Path) -> None:
    for name, value in load(folder, "float16").items():
        assert not isinstance(value, np.memmap), name
        assert value.dtype == np.float16


def test_a_change_stays_in_the_process(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    for value in load(folder).values():
        value[:] = 7
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_arrays_outlive_their_file(folder: Path) -> None:
    wanted, mapped = load(folder, mapped=False), load(folder)
    (folder / "model.safetensors").unlink()
    for name, value in mapped.items():
        np.testing.assert_array_equal(value, wanted[name], name)


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("place", [-4, -4000])
def test_a_damaged_file_gives_no_model(folder: Path, mapped: bool, place: int) -> None:
    """Also where the damage leaves finite numbers: all arrays come, and then the error."""
    flip(folder / "model.safetensors", place, 0)
    with open_checkpoint(folder) as reader:
        arrays = reader.verified(load_parameters(reader, CONFIG, "float32", mapped=mapped))
        for _ in expected_shapes(CONFIG):
            next(arrays)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or of another checkpoint"):
            next(arrays)


@pytest.mark.parametrize("mapped", [False, True])
def test_nan_is_found(folder: Path, mapped: bool) -> None:
    """With a manifest that knows it; without, the damage is the reason that is told."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or of another checkpoint"):
        load(folder, mapped=mapped)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="contains NaN or infinity"):
        load(folder, mapped=mapped)
