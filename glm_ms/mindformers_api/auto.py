"""`GLMConfig` as MindFormers' AutoConfig and AutoModel know a configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from mindformers import MindFormerConfig
from mindformers.models import build_model_config
from mindformers.models.configuration_utils import PretrainedConfig

from glm_ms import tokenizer as tokenizers
from glm_ms.convert import open_checkpoint
from glm_ms.mindformers_api.generation import LENGTHS, OPTIONS
from glm_ms.model.config import ConfigError
from glm_ms.model.config import GLMConfig as Architecture
from glm_ms.settings.schema import AUTO, VOCAB_MULTIPLE
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.storage.suggest import did_you_mean
from glm_ms.tokenizer import SentencePieceTokenizer

ARCH = "GLMForCausalLM"
# The one class by which AutoTokenizer finds ours; also what the released tokenizer_config.json files name.
TOKENIZER_CLASS = "ChatGLMTokenizer"

_FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))
_GENERATION = tuple(name for name in (*OPTIONS, *LENGTHS) if name not in _FIELDS)
_OF_THIS_CLASS = ("generation", "load_adapter", "tokenizer")
_OF_BASE_CLASS = (
    "name_or_path",
    "_commit_hash",
    "checkpoint_name_or_path",
    "architectures",
    "parallel_config",
)
# What MindFormers hands to every configuration, or writes into it; none of it says anything about this network.
# `use_past`: decoding always is incremental.
_WITHOUT_MEANING = (
    "_from_auto", "_from_pipeline", "auto_map", "batch_size", "bos_token_id", "calculate_per_token_loss",
    "code_revision", "dataset_config", "disable_lazy_inline", "is_encoder_decoder", "is_sample_acceleration",
    "mindformers_version", "model_generation", "model_type", "moe_config", "pet_config", "pretrained_model_dir",
    "quantization", "quantization_config", "tokenizer_class", "trust_remote_code", "type", "use_past",
)  # fmt: skip
_EMBEDDING = "transformer.embedding.embedding_table"


class GLMConfig(PretrainedConfig):
    """A `glm_ms.model.config.GLMConfig` with what MindFormers keeps beside an architecture.

    Args:
        kwargs: fields of the architecture; `padded_vocab_size: auto` is settled by the weights or by the tokenizer,
            if those are there. `checkpoint_name_or_path`: weights that a model built from this configuration begins
            with, of any kind that `glm_ms.load_pretrained` reads. `load_adapter`: adapter on top of them.
            `tokenizer`: `type` and `vocab_file`, as in `processor.tokenizer` of a YAML. Options of generation become
            the model's defaults.

    Attributes:
        generation: options of generation by name.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used.
    """

    model_type = "chatglm"
    attribute_map = {"vocab_size": "padded_vocab_size"}  # noqa: RUF012 - declared by the base class

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("name_or_path", kwargs.pop("_name_or_path", ""))
        source = str(kwargs["name_or_path"]) or type(self).__name__
        _reject_unknown(kwargs, source)
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ConfigError(
                f"{source}: model_type = {kwargs['model_type']!r}: expected {self.model_type!r}"
            )
        super().__init__(**{key: kwargs[key] for key in _OF_BASE_CLASS if key in kwargs})
        self.architectures = self.architectures or [ARCH]
        self.tokenizer_class = TOKENIZER_CLASS
        self.tokenizer = dict(kwargs.get("tokenizer") or {})
        self.load_adapter = kwargs.get("load_adapter") or ""
        self.generation = {key: kwargs[key] for key in _GENERATION if key in kwargs}
        self.generation = {**(kwargs.get("generation") or {}), **self.generation}
        fields = {key: kwargs[key] for key in _FIELDS if key in kwargs}
        if isinstance(
            fields.get("eos_token_id"), (list, tuple)
        ):  # a network has one; generation may have several
            self.generation["eos_token_id"] = list(fields["eos_token_id"])
            fields["eos_token_id"] = fields["eos_token_id"][0]
        self._set_fields(fields, source)

    def _set_fields(self, fields: dict[str, Any], source: str) -> None:
        if fields.get("padded_vocab_size") == AUTO:
            fields["padded_vocab_size"] = self._fitted_vocab_size()
        fitted = {key: value for key, value in fields.items() if value != AUTO}
        for key, value in Architecture.from_dict(fitted, source=source).to_dict().items():
            setattr(self, key, fields[key] if fields.get(key) == AUTO else value)

    def _fitted_vocab_size(self) -> int | str:
        """`auto` as a number: rows of the embedding in the weights, else the size of the tokenizer; else `auto`."""
        weights, tokenizer = self.checkpoint_name_or_path, self.own_tokenizer()
        if weights and Path(weights).exists():
            with open_checkpoint(resolve_checkpoint(weights)) as reader:
                if _EMBEDDING in reader.names():
                    return reader.shape(_EMBEDDING)[0]
        return AUTO if tokenizer is None else -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def own_tokenizer(self) -> SentencePieceTokenizer | None:
        """The tokenizer that the YAML of this configuration names; None without one, or if its file is missing."""
        vocab_file = self.tokenizer.get("vocab_file")
        if not vocab_file or not Path(vocab_file).is_file():
            return None
        return getattr(tokenizers, self.tokenizer["type"])(vocab_file)

    def architecture(self) -> Architecture:
        """The configuration of the network alone.

        Raises:
            ConfigError: `padded_vocab_size` still is `auto`.
        """
        source = self.name_or_path or type(self).__name__
        if self.padded_vocab_size == AUTO:
            raise ConfigError(
                f"{source}: padded_vocab_size: auto is fitted to the weights or to the tokenizer, and neither is there "
                f"(processor.tokenizer.vocab_file: {self.tokenizer.get('vocab_file') or 'not given'}); give a number"
            )
        return Architecture.from_dict({key: getattr(self, key) for key in _FIELDS}, source=source)

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_pretrained(cls, yaml_name_or_path: str, **kwargs: Any) -> GLMConfig:
        """Reads a Hugging Face folder, a `config.json`, or a YAML of this project.

        Args:
            yaml_name_or_path: the folder or file.
            kwargs: values that replace those of the file.

        Raises:
            ConfigError, SettingsError: the file is missing, broken, of another model type, or has unknown keys.
        """
        path = str(kwargs.pop("pretrained_model_name_or_path", None) or yaml_name_or_path)
        if Path(path).suffix not in (".yaml", ".yml"):
            return cls.from_dict({}, name_or_path=path, **kwargs)
        section = MindFormerConfig(path).model.model_config
        section.update(kwargs)
        return build_model_config(section)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> GLMConfig | tuple[GLMConfig, dict]:
        """What AutoConfig calls with the content of a config.json, and where it lies as `name_or_path`.

        The file is read once more by this project's reader, which knows every key of the released ones.

        Args:
            config_dict: content of the file; used only where no path is given.
            kwargs: values that replace those of the file; `return_unused_kwargs` asks for a pair, the second part of
                which is empty: an unknown key is an error.
        """
        as_pair = kwargs.pop("return_unused_kwargs", False)
        path = kwargs.get("name_or_path", "")
        values = Architecture.from_pretrained(path).to_dict() if path else config_dict
        config = cls(**{**values, **kwargs})
        return (config, {}) if as_pair else config

    def save_pretrained(
        self, save_directory: str | None = None, save_name: str = "mindspore_model", **kwargs: Any
    ) -> None:
        """Writes `config.json`, or `<save_name>.yaml` without `save_json=True`; AutoConfig reads both.

        Raises:
            ValueError: `save_directory` is missing or a file.
        """
        folder = made_folder(save_directory)
        if kwargs.get("save_json"):
            replace_text(
                folder / "config.json", json.dumps(self.architecture().to_hf_dict(), indent=2) + "\n"
            )
            return
        fields = {"type": type(self).__name__, **{key: getattr(self, key) for key in _FIELDS}}
        document = {"model": {"model_config": fields, "arch": {"type": ARCH}}}
        replace_text(folder / f"{save_name}.yaml", yaml.safe_dump(document, sort_keys=False))


def made_folder(path: str | None) -> Path:
    """The folder to save into, made if need be.

    Raises:
        ValueError: no path, or a file.
    """
    if not path or Path(path).is_file():
        raise ValueError(f"save_directory = {path!r}: give a folder to save into")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _reject_unknown(values: dict[str, Any], source: str) -> None:
    known = {*_FIELDS, *_GENERATION, *_OF_THIS_CLASS, *_OF_BASE_CLASS, *_WITHOUT_MEANING}
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{did_you_mean(key, [*_FIELDS, *_GENERATION])}")
