"""Weights and adapter of a run belong to its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import Settings
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import file_sha256, write_manifest_values


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
        write_manifest_values(folder, {"position": position})
        check_vocabulary(settings, said.append)
    write_manifest_values(folder, {"position": {"vocabulary": "of another"}})
    (folder / "model.safetensors").touch()
    for given in (tmp_path / "run", folder / "model.safetensors"):
        setattr(settings, key, str(given))
        with pytest.raises(CheckpointError, match=f"tokenizer.model: not the vocabulary with which {given} was train"):
            check_vocabulary(settings, said.append)
    settings.processor.tokenizer.allow_other_vocab = True
    check_vocabulary(settings, said.append)
    assert said == []
    path = given
    settings.processor.tokenizer.template = "plain"
    check_vocabulary(settings, said.append)
    write_manifest_values(folder, {"position": {"template": "plain"}})
    check_vocabulary(settings, said.append)
    settings.processor.tokenizer.template = "chat"
    check_vocabulary(settings, said.append)
    assert said == [
        f"{path}: trained with processor.tokenizer.template: chat, here it is plain",
        f"{path}: trained with processor.tokenizer.template: plain, here it is chat",
    ]
