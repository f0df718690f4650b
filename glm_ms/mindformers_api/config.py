"""`MindFormersGLMConfig`: a GLM configuration for MindFormers' AutoConfig and AutoModel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from mindformers import MindFormerConfig
from mindformers.models import build_model_config
from mindformers.models.configuration_utils import PretrainedConfig

from glm_ms.convert.reader import has_adapter, open_checkpoint
from glm_ms.families import family_of
from glm_ms.mindformers_api.generation import LENGTHS, OPTIONS
from glm_ms.mindformers_api.released import is_virtual, yaml_path
from glm_ms.mindformers_api.run_yaml import CONFIG_TYPE, MODEL_TYPE, yaml_in
from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.settings.schema import AUTO, VOCAB_MULTIPLE
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.run_folder import CHECKPOINTS, resolve_checkpoint
from glm_ms.storage.suggest import did_you_mean
from glm_ms.storage.yaml_tree import read_yaml
from glm_ms.tokenizer import SentencePieceTokenizer
from glm_ms.tokenizer.base import CHAT

# The tokenizer class that the released tokenizer_config.json files name.
TOKENIZER_CLASS = "ChatGLMTokenizer"

_FIELDS = tuple(field.name for field in dataclasses.fields(GLMConfig))
_GENERATION = tuple(name for name in (*OPTIONS, *LENGTHS) if name not in _FIELDS)
_OF_THIS_CLASS = ("generation", "load_adapter", "tokenizer")
_OF_BASE_CLASS = ("name_or_path", "_commit_hash", "checkpoint_name_or_path", "architectures", "parallel_config")
# Keys that MindFormers passes to every configuration, or adds to it, and that this network does not use.
# `use_past`: decoding is always incremental.
_IGNORED = (
    "_from_auto", "_from_pipeline", "auto_map", "batch_size", "bos_token_id", "calculate_per_token_loss",
    "code_revision", "dataset_config", "disable_lazy_inline", "is_encoder_decoder", "is_sample_acceleration",
    "mindformers_version", "model_generation", "model_type", "moe_config", "pet_config", "pretrained_model_dir",
    "quantization", "quantization_config", "tokenizer_class", "trust_remote_code", "type", "use_past",
)  # fmt: skip
_KNOWN = {*_FIELDS, *_GENERATION, *_OF_THIS_CLASS, *_OF_BASE_CLASS, *_IGNORED}
# Keyword arguments of from_pretrained about downloads. glm_ms downloads nothing.
DOWNLOAD_OPTIONS = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "resume_download", "revision",
    "subfolder", "token", "trust_remote_code", "use_auth_token", "_commit_hash", "_from_auto", "_from_pipeline",
)  # fmt: skip
_EMBEDDING = "transformer.embedding.embedding_table"


class MindFormersGLMConfig(PretrainedConfig):
    """A `glm_ms.GLMConfig` with the keys that MindFormers keeps in a model configuration.

    Args:
        kwargs: fields of the architecture. `padded_vocab_size: auto` is taken from the weights, or else from the
            tokenizer. `checkpoint_name_or_path`: initial weights, in any format that `glm_ms.load_pretrained` reads.
            `load_adapter`: adapter for these weights; `pet_config` has the `lora_alpha` of MindFormers' LoRA.
            `tokenizer`: `type` and `vocab_file`, as in
            `processor.tokenizer` of a YAML. Generation options become the defaults of the model (`generation`).
            ConfigError for an unknown key or invalid value.
    """

    model_type = "chatglm"
    architectures: list[str] | None
    attribute_map = {"vocab_size": "padded_vocab_size"}  # noqa: RUF012 - declared by the base class

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("name_or_path", kwargs.pop("_name_or_path", ""))
        source = str(kwargs["name_or_path"]) or type(self).__name__
        for key in kwargs:
            if key not in _KNOWN:
                raise ConfigError(f"{source}: unknown key {key!r}{did_you_mean(key, [*_FIELDS, *_GENERATION])}")
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ConfigError(f"{source}: model_type = {kwargs['model_type']!r}: expected {self.model_type!r}")
        super().__init__(**{key: kwargs[key] for key in _OF_BASE_CLASS if key in kwargs})
        self.architectures = self.architectures or [MODEL_TYPE]
        self.tokenizer_class = TOKENIZER_CLASS
        self.tokenizer = dict(kwargs.get("tokenizer") or {})
        self.load_adapter = kwargs.get("load_adapter") or ""
        pet = dict(kwargs.get("pet_config") or {})
        self.lora_alpha: float | None = pet.get("lora_alpha") if pet.get("pet_type") == "lora" else None
        own_options = {key: kwargs[key] for key in _GENERATION if key in kwargs}
        self.generation = {**(kwargs.get("generation") or {}), **own_options}
        fields = {key: kwargs[key] for key in _FIELDS if key in kwargs}
        eos = fields.get("eos_token_id")
        if isinstance(eos, (list, tuple)):  # the network has one id, generation may have several
            self.generation["eos_token_id"] = list(eos)
            fields["eos_token_id"] = eos[0]
        if fields.get("padded_vocab_size") == AUTO:
            fields["padded_vocab_size"] = self._find_vocab_size()
        known = {key: value for key, value in fields.items() if value != AUTO}
        for key, value in GLMConfig.from_dict(known, source=source).to_dict().items():
            setattr(self, key, fields[key] if fields.get(key) == AUTO else value)

    def _find_vocab_size(self) -> int | str:
        """Rows of the embedding in the weights, or else the padded size of the tokenizer, or else `auto`."""
        weights, tokenizer = self.checkpoint_name_or_path, self.build_tokenizer()
        if weights and Path(weights).exists():
            with open_checkpoint(resolve_checkpoint(weights)) as reader:
                if _EMBEDDING in reader.names():
                    return reader.shape(_EMBEDDING)[0]
        return AUTO if tokenizer is None else -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def build_tokenizer(self) -> SentencePieceTokenizer | None:
        """The tokenizer that the YAML names; None if it names none or the file does not exist."""
        vocab_file = self.tokenizer.get("vocab_file")
        if not vocab_file or not Path(vocab_file).is_file():
            return None
        return family_of(self.tokenizer["type"]).tokenizer(vocab_file, template=self.tokenizer.get("template", CHAT))

    def architecture(self) -> GLMConfig:
        """The configuration of the network alone; ConfigError if `padded_vocab_size` is still `auto`."""
        source = self.name_or_path or type(self).__name__
        if self.padded_vocab_size == AUTO:
            needed = "load_checkpoint or an existing processor.tokenizer.vocab_file"
            now = self.tokenizer.get("vocab_file") or "not given"
            raise ConfigError(f"{source}: padded_vocab_size: auto needs {needed} (now: {now}); or give a number")
        return GLMConfig.from_dict({key: getattr(self, key) for key in _FIELDS}, source=source)

    @classmethod
    def from_pretrained(cls, yaml_name_or_path: str = "", **kwargs: Any) -> Any:
        """Reads a Hugging Face folder, a run, a `config.json`, a YAML of glm_ms or of ChatGLM in MindFormers, a folder
        with one, or a name of `released`; `kwargs` replace values."""
        path = yaml_path(str(kwargs.pop("pretrained_model_name_or_path", None) or yaml_name_or_path))
        kwargs = {key: value for key, value in kwargs.items() if key not in DOWNLOAD_OPTIONS}
        folder = Path(path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            path = str(resolve_checkpoint(folder) if (folder / CHECKPOINTS).is_dir() else yaml_in(folder) or folder)
        if Path(path).suffix not in (".yaml", ".yml"):
            return cls.from_dict({}, name_or_path=path, **kwargs)
        if not is_virtual(path) and not Path(path).is_file():
            read_yaml(path, ConfigError)  # which names similar files
        as_pair = kwargs.pop("return_unused_kwargs", False)
        section = MindFormerConfig(path).model.model_config
        section.update(kwargs)
        config = build_model_config(section)
        return (config, {}) if as_pair else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """AutoConfig calls this with the content of a config.json and its path as `name_or_path`.

        With a path, the reader of glm_ms reads the file again, because it knows every key of the released files. Other
        `kwargs` replace values. `return_unused_kwargs` asks for a pair, whose second part is empty: an unknown key is
        an error.
        """
        as_pair = kwargs.pop("return_unused_kwargs", False)
        path = kwargs.get("name_or_path", "")
        if path:
            try:
                own = GLMConfig.from_pretrained(path)
            except ConfigError:  # perhaps because of a prefix, which the weights may contain; opening them takes time
                if not has_adapter(path if Path(path).is_dir() else Path(path).parent):
                    raise
                own = GLMConfig.from_pretrained(path, with_prefix=True)
            config_dict = own.to_dict()
        config = cls(**{**config_dict, **kwargs})
        return (config, {}) if as_pair else config

    def save_pretrained(
        self, save_directory: str | None = None, save_name: str = "mindspore_model", **kwargs: Any
    ) -> None:
        """Writes `config.json` with `save_json=True`, else `<save_name>.yaml`. AutoConfig reads both."""
        folder = create_folder(save_directory)
        if kwargs.get("save_json"):
            replace_text(folder / "config.json", json.dumps(self.architecture().to_hf_dict(), indent=2) + "\n")
            return
        fields = {"type": CONFIG_TYPE, **{key: getattr(self, key) for key in _FIELDS}}
        document = {"model": {"model_config": fields, "arch": {"type": MODEL_TYPE}}}
        replace_text(folder / f"{save_name}.yaml", yaml.safe_dump(document, sort_keys=False))


def create_folder(path: str | None) -> Path:
    """Creates the folder to save into; ValueError without a path or for the path of a file."""
    if not path or Path(path).is_file():
        raise ValueError(f"save_directory = {path!r}: give a folder")
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
