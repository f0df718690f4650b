"""Weights and adapter of a run belong to its vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_ms.settings import Settings
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import file_sha256


@pytest.mark.parametrize("key", ["load_checkpoint", "load_adapter"])
def test_another_vocabulary_is_refused(tmp_path: Path, key: str) -> None:
    from glm_ms.engine.weights import check_vocabulary

    vocabulary, folder = tmp_path / "tokenizer.model", tmp_path / "run" / "checkpoint" / "step_00000001"
    vocabulary.write_bytes(b"one")
    folder.mkdir(parents=True)
    settings = Settings(**{key: str(tmp_path / "run")})
    settings.processor.tokenizer.vocab_file = str(vocabulary)
    said: list[str] = []
    check_vocabulary(settings, said.append)  # weights without a manifest
    for position in ({"vocabulary": file_sha256(vocabulary)}, {}, None):
        (folder / "manifest.json").write_text(json.dumps({"position": position}))
        check_vocabulary(settings, said.append)
    (folder / "manifest.json").write_text(json.dumps({"position": {"vocabulary": "of another"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not the vocabulary with which .*/run was trained"):
        check_vocabulary(settings, said.append)
    settings.processor.tokenizer.allow_other_vocab = True
    check_vocabulary(settings, said.append)
    assert said == []
    path = tmp_path / "run"
    settings.processor.tokenizer.template = "plain"
    check_vocabulary(settings, said.append)
    (folder / "manifest.json").write_text(json.dumps({"position": {"template": "plain"}}))
    check_vocabulary(settings, said.append)
    settings.processor.tokenizer.template = "chat"
    check_vocabulary(settings, said.append)
    assert said == [
        f"{path}: trained with processor.tokenizer.template: chat, here it is plain",
        f"{path}: trained with processor.tokenizer.template: plain, here it is chat",
    ]
