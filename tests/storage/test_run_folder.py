"""Which weights a folder means: its content decides, not its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.convert.cluster.strategy_file import read_strategy
from glm_ms.model.config import GLMConfig
from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.storage.json_lines import raw_values
from glm_ms.storage.run_folder import resolve_checkpoint


def make(folder: Path, *files: str) -> Path:
    """A folder with empty files; a name that ends in / is a folder."""
    for name in files:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["checkpoint/step_00000009/a", "checkpoint/step_00000010/a"], "checkpoint/step_00000010"),
        (["model.safetensors", "checkpoint/"], ""),
        (["pytorch_model-00001-of-00002.bin", "checkpoint/notes.txt"], ""),
        (["adapter_model.bin", "slices/", "checkpoint/"], ""),
        (["checkpoint/rank_0/glm-1_10.ckpt"], "checkpoint"),
        (["checkpoint/rank_0/", "checkpoint/rank_1/", "checkpoint_network/rank_0/"], "checkpoint"),
        (["checkpoint/glm.ckpt"], "checkpoint"),
        (["rank_0/glm.ckpt", "checkpoint/"], ""),
        (["slices/notes.txt"], ""),
    ],
)
def test_what_is_meant(tmp_path: Path, files: list[str], found: str) -> None:
    assert resolve_checkpoint(make(tmp_path, *files)) == tmp_path / found


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["checkpoint/"], "has no checkpoint yet"),
        (["slices/rank_0/checkpoint/step_00000001/a"], "merge them first"),
        (["model.safetensors", "checkpoint/step_00000001/a"], r"has weights .model\.safetensors. and the checkpoints"),
    ],
)
def test_what_cannot_be_told(tmp_path: Path, files: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(make(tmp_path, *files))


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, ""])
def test_paths_that_cannot_be(path: str) -> None:
    for read in (resolve_checkpoint, GLMConfig.from_pretrained, read_strategy, lambda name: next(raw_values(name))):
        with pytest.raises(FileError, match=r"NUL character|too long for a path|a path is empty|^\.: is a folder"):
            read(path)
