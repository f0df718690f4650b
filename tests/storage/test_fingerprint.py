"""The fingerprint of weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.storage import fingerprint
from glm_ms.storage.fingerprint import weights_fingerprint


def test_a_fingerprint_is_that_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_WHOLE", 1 << 20)  # so that 5 MB are sampled
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(5 << 20))
        (folder / "optimizer.safetensors").write_bytes(folder.name.encode())  # is no weight
        (folder / "config.json").write_text(folder.name)
    whole = weights_fingerprint(one)
    assert weights_fingerprint(other) == whole
    file = one / "model.safetensors"
    assert weights_fingerprint(file) == weights_fingerprint(file.rename(tmp_path / "x.ckpt"))
    for place in (0, (5 << 20) - 1, (5 << 20) // 63):  # first, last and second block
        content = bytearray(5 << 20)
        content[place] = 1
        (other / "model.safetensors").write_bytes(content)
        assert weights_fingerprint(other) != whole
    (other / "model.safetensors").write_bytes(bytes((5 << 20) + 1))
    assert weights_fingerprint(other) != whole
    mindformers = tmp_path / "checkpoint"
    (mindformers / "rank_0").mkdir(parents=True)
    nothing = weights_fingerprint(mindformers)
    (mindformers / "rank_0" / "glm3.ckpt").write_bytes(b"weights")
    assert weights_fingerprint(mindformers) != nothing
