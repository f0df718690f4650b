"""Finds the SentencePiece model for `AutoTokenizer.from_pretrained` and tells which ChatGLM it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm_ms.families import FAMILIES, family_of
from glm_ms.mindformers_api.run_yaml import read_run_yaml
from glm_ms.storage.readers import read_object
from glm_ms.tokenizer import VocabularyError

MODEL_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer_config.json"
# ChatGLM2 and ChatGLM3 use the same SentencePiece model. tokenizer_config.json tells them apart: by this key, which
# `save_pretrained` writes, or by the name of the released model.
GENERATION_KEY = "model_generation"
_RELEASED = {name: family.generation for family in FAMILIES.values() for name in family.released}
_PUBLISHERS = ("THUDM", "zai-org", "ZhipuAI")


def find_tokenizer(path: Path, generation: int | None = None) -> tuple[int, Path]:
    """The generation (2 or 3) and the SentencePiece model of a path, as in `ChatGLMTokenizer.from_pretrained`.

    `generation` replaces the one found at `path`.
    """
    if generation not in (None, *_RELEASED.values()):
        raise VocabularyError(f"{GENERATION_KEY} = {generation!r}: must be 2 or 3")
    if path.suffix in (".yaml", ".yml"):
        return _find_in_yaml(path, generation)
    if path.is_dir() and not (path / MODEL_FILE).is_file():
        for yaml_of_run in sorted(path.glob("*settings.yaml")):
            return _find_in_yaml(yaml_of_run, generation)
        raise VocabularyError(
            f"{path}: no {MODEL_FILE} here; copy the one of the weights into the folder, or give its path or the YAML "
            "of the run"
        )
    vocab_file = path / MODEL_FILE if path.is_dir() else path
    generation = generation or _stored_generation(vocab_file.parent)
    if generation is None:
        raise VocabularyError(
            f"{path}: ChatGLM2 and ChatGLM3 have the same {MODEL_FILE}, and {CONFIG_FILE} does not tell which one this "
            f"is; give {GENERATION_KEY}=2 or {GENERATION_KEY}=3"
        )
    return generation, vocab_file


def _find_in_yaml(path: Path, generation: int | None) -> tuple[int, Path]:
    chosen = read_run_yaml(path).processor.tokenizer
    if not chosen.vocab_file:
        raise VocabularyError(
            f"{path}: processor.tokenizer.vocab_file: missing; give the path of a {MODEL_FILE}"
        )
    return generation or family_of(chosen.type).generation, Path(chosen.vocab_file)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Content of `tokenizer_config.json`, empty without the file; VocabularyError if it is not a JSON object."""
    path = folder / CONFIG_FILE
    return read_object(path, VocabularyError) if path.is_file() else {}


def _stored_generation(folder: Path) -> int | None:
    config = read_tokenizer_config(folder)
    publisher, _, name = str(config.get("name_or_path", "")).partition("/")
    released = _RELEASED.get(name) if publisher in _PUBLISHERS else None
    return config.get(GENERATION_KEY, released)
