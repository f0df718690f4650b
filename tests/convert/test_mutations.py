"""Hundreds of mutated files of weights and adapters: each is read, or refused by name; none ends in a traceback."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from strategy_helpers import Cut, strategy_bytes

from glm_ms.convert.cluster.strategy_file import read_strategy
from glm_ms.convert.conversion import plan_conversion
from glm_ms.convert.reader import open_checkpoint
from glm_ms.families import read_config
from glm_ms.peft.adapter import read_adapter
from glm_ms.storage.errors import FileError

ROUNDS = 100
INSERTED = (
    b"{",
    b"[",
    b'"',
    b"1e999",
    b"NaN",
    b"null",
    b"-1",
    b"\xff",
    b"9" * 20,
    b'"r": 3,',
    b"true",
    b"\xef\xbb\xbf",
)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One to three changes, half of them in the first bytes, where headers are."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3))):
        place = draw.randrange(len(found) if draw.random() < 0.5 else min(len(found), 600))
        kind = draw.random()
        if kind < 0.5:
            found[place] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            found[place] = draw.randrange(256)
        elif kind < 0.8:
            del found[place : place + draw.randrange(1, 20)]
        else:
            found[place:place] = draw.choice((*INSERTED, bytes(found[max(place - 30, 0) : place])))
        found = found or bytearray(b"x")
    return bytes(found)


@pytest.fixture
def files(golden: Path, tmp_path: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Kind -> an intact file, and how it is read as a whole."""
    base = golden / "models" / "glm2_tiny"

    def convert(path: Path) -> None:
        plan_conversion(path, tmp_path / "out.safetensors", config=base, overwrite=True).run()

    shutil.copy(base / "config.json", tmp_path)
    shutil.copy(base / "model.safetensors", tmp_path / "m.safetensors")
    plan_conversion(base, tmp_path / "m.ckpt").run()
    shutil.copytree(base / "sharded", tmp_path / "sharded")
    shutil.copytree(golden / "train" / "lora" / "final", tmp_path / "lora")
    (tmp_path / "strategy_rank_0.ckpt").write_bytes(strategy_bytes({"w": Cut([2, 2], [0, -1]), "b": Cut([2, 2], [-1])}))
    return {
        "config": (tmp_path / "config.json", read_config),
        "safetensors": (tmp_path / "m.safetensors", convert),
        "ckpt": (tmp_path / "m.ckpt", convert),
        "index": (tmp_path / "sharded" / "pytorch_model.bin.index.json", lambda path: open_checkpoint(path.parent)),
        "adapter config": (tmp_path / "lora" / "adapter_config.json", lambda path: read_adapter(path.parent)),
        "adapter": (tmp_path / "lora" / "adapter_model.safetensors", lambda path: read_adapter(path.parent)),
        "strategy": (tmp_path / "strategy_rank_0.ckpt", read_strategy),
    }


@pytest.mark.parametrize("kind", ["config", "safetensors", "ckpt", "index", "adapter config", "adapter", "strategy"])
def test_mutations_are_read_or_refused(files, kind: str) -> None:
    path, read = files[kind]
    content, draw, refused = path.read_bytes(), random.Random(7), 0
    read(path)
    for _ in range(ROUNDS):
        path.write_bytes(mutated(content, draw))
        try:
            read(path)
        except FileError as error:
            refused += 1
            assert path.stem.partition(".")[0] in str(error)  # noqa: PT017, a changed name can be harmless
    assert refused > ROUNDS // 4
