"""From paths to a model that is ready to run, and to its tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms

from glm_ms.convert.reader import open_checkpoint
from glm_ms.families import FAMILIES, Family, family_of, read_config
from glm_ms.generation import GLMForCausalLM
from glm_ms.model.config import GLMConfig
from glm_ms.peft import is_adapter_folder
from glm_ms.peft.adapter import AdapterError, adapter_with, base_remark, replaced_adapter
from glm_ms.quant import Quantization
from glm_ms.settings.loader import unchecked_settings
from glm_ms.spelling import argument, given
from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.storage.paths import exists, path_problem
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import CHECKPOINTS, resolve_checkpoint
from glm_ms.tokenizer import SentencePieceTokenizer, VocabularyError
from glm_ms.tokenizer.base import CHAT

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.model", "tokenizer_config.json"
# ChatGLM2 and ChatGLM3 use the same SentencePiece model. This key of tokenizer_config.json, which glm_ms writes, tells
# them apart, or else the name of the released model.
GENERATION_KEY = "model_generation"
GENERATIONS = {family.generation: family for family in FAMILIES.values()}
_RELEASED = {name: family.generation for family in FAMILIES.values() for name in family.released}
_PUBLISHERS = ("THUDM", "zai-org", "ZhipuAI")


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def load_pretrained(
    path: str | Path,
    config: GLMConfig | str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    quantization: Quantization | None = None,
    kv_cache: str | None = None,
    say: Callable[[str], None] = _warn,
) -> GLMForCausalLM:
    """Loads a model. A CPU computes in float32; weights of float16 and bfloat16 keep their type in memory if the C++
    kernels are there, else they become float32. Elsewhere all types are as the config says.

    Args:
        path: Hugging Face folder (safetensors, or .bin shards), MindSpore `.ckpt` or `.safetensors`, or the
            output folder of a training run (its newest checkpoint).
        config: architecture, or the folder, `config.json` or YAML to read it from. None: `config.json` in `path`.
        adapter: LoRA or P-Tuning adapter to attach; see `GLMForCausalLM.load_adapter`. None: the adapter that the
            files of the weights contain, if they do; another one replaces it.
        lora_alpha: see `GLMForCausalLM.load_adapter`.
        quantization: how to quantize the weights while they are read (`glm_ms.quant.quantization`); None: they stay as
            they are in the file.
        kv_cache: see `GLMForCausalLM.kv_cache`.
        say: takes remarks for the user, by default as warnings.

    An answer ends at the stop tokens of the tokenizer in the folder of the weights or of their run, if there is one.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its tensors do not fit the config.
        AdapterError: the adapter cannot be used.
        ConfigError: the config cannot be used.
        StorageError: keys and values cannot have this type here.
    """
    path, asked = resolve_checkpoint(path), Path(path)
    if is_adapter_folder(path):
        raise CheckpointError(
            f"{path}: an adapter, not weights; give the base it was trained on as the model, and this as its adapter"
        )
    if config is None:
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json here; give the config.json or YAML of the network as {argument('config')}"
            )
        config = path
    with open_checkpoint(path) as reader:
        if not isinstance(config, GLMConfig):
            config = read_config(config, with_prefix=bool(reader.adapter_names()))
        if ms.get_context("device_target") == "CPU":
            config = dataclasses.replace(config, compute_dtype="float32")
        named, adapter = adapter, adapter_with(reader, adapter)
        if adapter is None and lora_alpha is not None:
            raise AdapterError(
                f"{given('lora_alpha', f'{lora_alpha:g}')}: {path} has no adapter, and none is given; remove it"
            )
        model = GLMForCausalLM.from_checkpoint(reader, config, quantization)
        model.kv_cache = kv_cache
    model.stop_token_ids = _stop_token_ids(asked, path, config)
    if adapter is not None:
        model.load_adapter(adapter, lora_alpha)
    for remark in (replaced_adapter(reader, named), base_remark(named, path)) if named is not None else ():
        if remark:
            say(remark)
    return model


def load_with_tokenizer(
    path: str | Path,
    config: GLMConfig | str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    tokenizer: str | Path | None = None,
    generation: int | None = None,
    quantization: Quantization | None = None,
    kv_cache: str | None = None,
    say: Callable[[str], None] = _warn,
) -> tuple[GLMForCausalLM, SentencePieceTokenizer]:
    """A model, see `load_pretrained`, and its tokenizer.

    Args:
        tokenizer, generation: see `find_tokenizer`; None: the tokenizer beside the weights or of their run.

    Raises:
        FileError: a file cannot be used, or the tokenizer is of another model.
    """
    for named in (tokenizer, config, adapter):
        if isinstance(named, (str, Path)) and not exists(named):
            raise CheckpointError(f"{named}: no such file or folder")
    checkpoint = resolve_checkpoint(path)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    beside = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    family, vocab_file, options = find_tokenizer(tokenizer or beside, generation)
    made = family.tokenizer(vocab_file, template=options.get("template", CHAT))
    model = load_pretrained(path, config, adapter, lora_alpha, quantization, kv_cache, say)
    check_vocabulary(made, model.config)
    return model, made


def check_vocabulary(tokenizer: SentencePieceTokenizer, config: GLMConfig) -> None:
    """Raises CheckpointError if a tokenizer has ids that the network does not have."""
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise CheckpointError(
            f"{tokenizer.vocab_file}: {tokenizer.vocab_size} ids, but the network has {config.padded_vocab_size}; give "
            "the tokenizer of these weights"
        )


def find_tokenizer(
    path: str | Path, generation: int | None = None, vocab_file: str | Path | None = None
) -> tuple[Family, Path, dict[str, Any]]:
    """The tokenizer of a folder, of a run, of a YAML file, or a SentencePiece model itself.

    Args:
        path: a folder with tokenizer.model, the output folder of a run, a folder with one YAML file, a YAML file of
            glm_ms or MindFormers, or a SentencePiece model.
        generation: 2 or 3, for ChatGLM2 or ChatGLM3; None: as found there.
        vocab_file: a SentencePiece model to use in place of the one there.

    Returns the family, the SentencePiece model and options: the content of tokenizer_config.json, or those of the YAML.
    Raises VocabularyError or SettingsError if there is no tokenizer, or nothing tells its generation.
    """
    for named in (path, path if vocab_file is None else vocab_file):
        if problem := path_problem(named):
            raise VocabularyError(problem)
    path, config, found = Path(path), dict[str, Any](), generation
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file() and vocab_file is None:
        yaml_files = sorted(path.glob("*settings.yaml")) or sorted(path.glob("*.yaml"))
        if not yaml_files:
            remedy = "copy the one of the weights into the folder, or give its path or the YAML of the run"
            raise VocabularyError(f"{path}: no {TOKENIZER_FILE} here; {remedy}")
        path = yaml_files[0]
    if path.suffix in (".yaml", ".yml"):
        chosen = unchecked_settings(path).processor.tokenizer
        vocab_file = vocab_file or chosen.vocab_file
        if not vocab_file:
            raise VocabularyError(
                f"{path}: processor.tokenizer.vocab_file: missing; give the path of a {TOKENIZER_FILE}"
            )
        config = {"template": chosen.template}
        found = family_of(chosen.type).generation if generation is None else generation
    else:
        config = read_tokenizer_config(path if path.is_dir() else path.parent)
        vocab_file = vocab_file or (path / TOKENIZER_FILE if path.is_dir() else path)
        if generation is None:
            found = config.get(GENERATION_KEY) or _generation_beside(path if path.is_dir() else path.parent, config)
    if found is None:
        raise VocabularyError(
            f"{path}: ChatGLM2 and ChatGLM3 have the same {TOKENIZER_FILE}, and {TOKENIZER_CONFIG} does not tell which "
            f"one this is; give {given(GENERATION_KEY, 2)} or {given(GENERATION_KEY, 3)}"
        )
    if type(found) is not int or found not in GENERATIONS:
        allowed = " or ".join(map(str, GENERATIONS))
        raise VocabularyError(f"{path}: {GENERATION_KEY} = {found!r}: must be {allowed}")
    return GENERATIONS[found], Path(vocab_file), config


def _generation_beside(folder: Path, config: dict[str, Any]) -> int | None:
    """2 or 3 by the name of a released model in tokenizer_config.json or config.json, as `THUDM/chatglm3-6b`, or by the
    tokenizer of the only YAML file of a folder; None if nothing tells."""
    names = [config.get("name_or_path")]
    if (folder / "config.json").is_file():
        names.append(read_object(folder / "config.json", VocabularyError).get("_name_or_path"))
    for publisher, _, name in (str(name).partition("/") for name in names):
        if publisher in _PUBLISHERS and name in _RELEASED:
            return _RELEASED[name]
    yaml_files = list(folder.glob("*.yaml"))
    if len(yaml_files) != 1:
        return None
    try:
        return family_of(unchecked_settings(yaml_files[0]).processor.tokenizer.type).generation
    except FileError:  # of another program
        return None


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Content of `tokenizer_config.json`, empty without the file; VocabularyError if it is not a JSON object."""
    path = folder / TOKENIZER_CONFIG
    return read_object(path, VocabularyError) if path.is_file() else {}


def _stop_token_ids(given: Path, checkpoint: Path, config: GLMConfig) -> list[int] | None:
    """Stop ids of the tokenizer in the folder of the weights or of their run; None if there is no usable tokenizer.

    If nothing tells its generation they are those of ChatGLM3, because they include those of ChatGLM2.
    """
    folders = [given if given.is_dir() else given.parent]
    if checkpoint.parent.name == CHECKPOINTS:
        folders.append(checkpoint.parent.parent)
    for folder in folders:
        if not (folder / TOKENIZER_FILE).is_file() and not any(folder.glob("*settings.yaml")):
            continue
        for generation in (None, max(GENERATIONS)):
            try:
                family, vocab_file, options = find_tokenizer(folder, generation)
                ids = family.tokenizer(vocab_file, template=options.get("template", CHAT)).stop_token_ids
            except ValueError:  # weights are usable without a tokenizer
                continue
            return [token for token in ids if token < config.padded_vocab_size]
    return None
