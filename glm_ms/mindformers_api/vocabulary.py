"""Where `AutoTokenizer.from_pretrained` finds a vocabulary, and for which ChatGLM it is."""

from __future__ import annotations

from pathlib import Path

from glm_ms.families import FAMILIES
from glm_ms.settings.document import Entry, read_document
from glm_ms.settings.sections import TokenizerSettings
from glm_ms.storage.readers import read_object
from glm_ms.tokenizer import VocabularyError

VOCABULARY_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer_config.json"
# Vocabularies of ChatGLM2 and ChatGLM3 are the same file. Which one a folder is for its tokenizer_config.json tells: by
# this key, which `save_pretrained` writes, or by the name under which the model was released.
GENERATION_KEY = "model_generation"
_RELEASED = {name: family.generation for family in FAMILIES.values() for name in family.released}
_PUBLISHERS = ("THUDM", "zai-org", "ZhipuAI")
_GENERATIONS = {family.tokenizer.__name__: family.generation for family in FAMILIES.values()}


def find_vocabulary(path: Path, generation: int | None = None) -> tuple[int, Path]:
    """The generation (2 or 3) and the vocabulary file that a path stands for.

    Args:
        path: a folder with tokenizer.model; the output folder of a run; a YAML of this project; or the file itself.
        generation: where the caller knows; it comes before what is found.

    Raises:
        VocabularyError: no vocabulary there, or nothing tells the generation.
        SettingsError: a YAML that cannot be read.
    """
    if generation is not None and generation not in _GENERATIONS.values():
        raise VocabularyError(f"{GENERATION_KEY} = {generation!r}: must be 2 or 3")
    if path.suffix in (".yaml", ".yml"):
        return _in_yaml(path, generation)
    if path.is_dir() and not (path / VOCABULARY_FILE).is_file():
        of_a_run = sorted(path.glob("*settings.yaml"))
        if of_a_run:
            return _in_yaml(of_a_run[0], generation)
        raise VocabularyError(
            f"{path}: holds no {VOCABULARY_FILE}; copy the one that belongs to the weights there, or give its path or "
            "the YAML of the run"
        )
    vocab_file = path / VOCABULARY_FILE if path.is_dir() else path
    generation = generation or _stored_generation(vocab_file.parent / CONFIG_FILE)
    if generation is None:
        raise VocabularyError(
            f"{path}: nothing there tells whether it is for ChatGLM2 or ChatGLM3, which share their vocabulary; give "
            f"{GENERATION_KEY}=2 or {GENERATION_KEY}=3"
        )
    return generation, vocab_file


def _in_yaml(path: Path, generation: int | None) -> tuple[int, Path]:
    section: Entry | None = read_document(path)
    for name in ("processor", "tokenizer"):
        section = section.value.get(name) if section is not None and section.is_section else None
    keys = section.value if section is not None and section.is_section else {}
    vocab_file = keys["vocab_file"].value if "vocab_file" in keys else None
    if not vocab_file:
        raise VocabularyError(
            f"{path}: processor.tokenizer.vocab_file: missing; give the path of a {VOCABULARY_FILE}"
        )
    name = keys["type"].value if "type" in keys else TokenizerSettings().type
    if name not in _GENERATIONS:
        raise VocabularyError(
            f"{keys['type'].where}: processor.tokenizer.type: {name!r}: must be one of {', '.join(_GENERATIONS)}"
        )
    return generation or _GENERATIONS[name], Path(vocab_file)


def _stored_generation(path: Path) -> int | None:
    """What a tokenizer_config.json tells; None if it does not."""
    if not path.is_file():
        return None
    config = read_object(path, VocabularyError)
    publisher, _, name = str(config.get("name_or_path", "")).partition("/")
    released = _RELEASED.get(name) if publisher in _PUBLISHERS else None
    return config.get(GENERATION_KEY, released)
