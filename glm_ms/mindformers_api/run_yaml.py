"""Converts a YAML of glm_ms to the MindFormerConfig that MindFormers needs, and back to checked settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindformers import MindFormerConfig

from glm_ms.engine.mindformers_internals import section_keys
from glm_ms.mindformers_api.released import is_virtual, settings_of_name
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.legacy.table import CONFIGS, NETWORKS
from glm_ms.settings.legacy.translate import is_legacy
from glm_ms.settings.loader import unchecked_settings
from glm_ms.settings.schema import leaf_keys
from glm_ms.settings.values import Converter
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_text
from glm_ms.storage.suggest import did_you_mean
from glm_ms.storage.yaml_tree import Entry, read_yaml

# Names in YAML files and in MindFormers' registry.
CONFIG_TYPE, MODEL_TYPE = "GLMConfig", "GLMForCausalLM"
_TOLD: set[str] = set()  # files whose names have been explained
# The section of a MindFormerConfig for the keys in _MOVED.
OWN_SECTION = "glm_ms"
TOKENIZERS = {"ChatGLM2Tokenizer": "GLM2Tokenizer", "ChatGLM3Tokenizer": "GLM3Tokenizer"}
PROCESSOR_TYPE = "GLMTextProcessor"
CORE_TOKENIZERS = {registered: name for name, registered in TOKENIZERS.items()}
# MindFormers overwrites these three under their own names.
_OVERWRITTEN = ("load_checkpoint", "resume_training", "eval_dataset.batch_size")
# Keys that MindFormers overwrites, refuses (max_steps) or gives another meaning (the section checkpoint).
_MOVED = (*_OVERWRITTEN, "runner_config.max_steps", *(key for key in leaf_keys() if key.startswith("checkpoint.")))
# Keys that MindFormers adds to sections of glm_ms.
_DATASET = "auto_tune autotune_per_step batch_size do_eval filepath_prefix input_columns output_columns profile"
_ADDED = {
    "train_dataset": f"{_DATASET} micro_batch_num mixup_op seed tokenizer",
    "eval_dataset": f"{_DATASET} seed tokenizer",
    "model": "generation_config pretrained_model_dir",
    "model.model_config": "batch_size checkpoint_name_or_path disable_lazy_inline generation load_adapter name_or_path "
    "parallel_config tokenizer track_max_attention_logit",
    "runner_config": "global_batch_size initial_epoch initial_step mini_batch_size origin_epochs",
    "processor": "audio_processor image_processor type",
    "train_dataset.data_loader": "phase",
    "eval_dataset.data_loader": "phase",
}


def read_run_yaml(path: str) -> Settings:
    """The settings of a YAML, or of a virtual path of a model name, not checked for completeness; SettingsError for
    unknown keys or invalid values."""
    return settings_of_name(path) if is_virtual(path) else unchecked_settings(path)


def read_for_mindformers(path: str) -> dict[str, Any]:
    """The content of a MindFormers YAML for a path; tells on standard error, once, what MindFormers' names mean."""
    settings = read_run_yaml(path)
    if settings.notes and path not in _TOLD:
        _TOLD.add(path)
        print(*settings.notes, sep="\n", file=sys.stderr)
    document = mindformers_document(settings)
    document[OWN_SECTION]["named"] = is_virtual(path)
    return document


def is_run_yaml(path: str | Path) -> bool:
    """Whether a path is virtual, or a YAML of ChatGLM2 or ChatGLM3 in the names of glm_ms or of MindFormers.

    True also for one with errors, which glm_ms reports; False for files that cannot be read.
    """
    if is_virtual(str(path)):
        return True
    path = Path(path)
    try:
        document = read_yaml(path)
    except FileError:
        try:
            text = read_text(path)
        except FileError:
            return False
        names = "|".join((CONFIG_TYPE, MODEL_TYPE, *CONFIGS, *NETWORKS))
        return re.search(rf"\btype['\"]?\s*:\s*['\"]?({names})\b", text) is not None
    config, arch = (_type_of(document, name) for name in ("model_config", "arch"))
    if config == CONFIG_TYPE or arch == MODEL_TYPE:
        return True
    return is_legacy(document) and (config in CONFIGS or arch in NETWORKS)


def yaml_in(folder: Path) -> Path | None:
    """The first YAML of a folder that `is_run_yaml`."""
    return next((path for path in sorted(folder.glob("*.yaml")) if is_run_yaml(path)), None)


def _type_of(document: Entry, section: str) -> Any:
    """The value of `model.<section>.type`; None if there is none."""
    for name in ("model", section, "type"):
        document = (document.value.get(name) if document.is_section else None) or Entry(None, "")
    return document.value if isinstance(document.value, str) else None


def mindformers_document(settings: Settings) -> dict[str, Any]:
    """The content of a MindFormers YAML for these settings: keys of glm_ms, and those that MindFormers needs."""
    whole = settings.to_dict()
    own: dict[str, Any] = {"source": settings.source}
    for key in _MOVED:
        outer, _, name = key.rpartition(".")
        _put(own, key, (_get(whole, outer) if outer else whole).pop(name))
    tokenizer = whole["processor"]["tokenizer"]
    whole["model"]["model_config"].update(
        name_or_path=settings.source,
        checkpoint_name_or_path=own["load_checkpoint"] or None,
        load_adapter=whole["load_adapter"],
        tokenizer=dict(tokenizer),
        generation=dict(whole["generation"]),
    )
    tokenizer["type"] = TOKENIZERS[tokenizer["type"]]
    whole["processor"]["type"] = PROCESSOR_TYPE
    for part in ("train", "eval"):
        section = whole[f"{part}_dataset"]
        section.update(tokenizer=dict(tokenizer), batch_size=settings.runner_config.batch_size, seed=settings.seed)
        section["data_loader"]["phase"] = part  # MindFormers' own loader needs it
    whole["runner_config"].update(sink_mode=False, sink_size=-1)
    eval_dataset = {**whole["eval_dataset"], "do_eval": True}
    return {
        **whole,
        OWN_SECTION: own,
        "checkpoint": {},
        "load_checkpoint": None,
        "resume_training": None,
        "use_legacy": True,
        "trainer": {"type": "GLMTextGenerationTrainer", "model_name": "common"},
        "train_dataset_task": {"type": "GLMDataset", "dataset_config": whole["train_dataset"]},
        "eval_dataset_task": {"type": "GLMDataset", "dataset_config": eval_dataset},
    }


def settings_of(config: MindFormerConfig, **replaced: Any) -> Settings:
    """The settings of a MindFormerConfig that was read from a YAML of glm_ms, with later changes in Python.

    `config` is `MindFormerConfig("x.yaml")`, or that of the Trainer; `replaced` are newer values of top level keys.
    Raises SettingsError for another kind of configuration, unknown keys and invalid values.
    """
    own = config.get(OWN_SECTION)
    if not own:
        raise SettingsError(
            "this configuration was not read from a YAML of glm_ms (model.model_config.type: GLMConfig); give "
            "Trainer(args=...) the path of such a YAML, or MindFormerConfig(path)"
        )
    if "overwrite_output_dir" in config:
        raise SettingsError(
            "Trainer(args=TrainingArguments(...)): not supported with glm_ms; give the path of a YAML, or "
            "MindFormerConfig(path) and change its keys in Python"
        )
    problems = _unknown_keys(config)
    if problems:
        raise SettingsError(problems)
    before = read_run_yaml(own.source) if Path(own.source).is_file() else Settings(source=own.source)
    document: dict[str, Any] = {}
    for key in leaf_keys():
        value = replaced[key] if key in replaced else _value(config, own, key)
        changed = not _same(value, before.get(key))
        if not changed and key not in before.origins:
            continue  # its default may depend on other keys
        where = f"{own.source}, as changed in Python" if changed else before.where(key)
        _put(document, key, to_entry(value, where))
    return _convert(to_entry(document, own.source), own.source)


def to_entry(value: Any, where: str) -> Entry:
    """A value, list or nested dict as a document for `Converter`; existing entries stay as they are."""
    if isinstance(value, Entry):
        return value
    if isinstance(value, Mapping):
        return Entry({name: to_entry(item, where) for name, item in value.items()}, where, where)
    if isinstance(value, (list, tuple)):
        return Entry([to_entry(item, where) for item in value], where, where)
    return Entry(value, where, where)


def _convert(document: Entry, source: str) -> Settings:
    converter = Converter()
    settings = converter.settings(document, source)
    if converter.problems:
        raise SettingsError(converter.problems)
    return settings


def _value(config: MindFormerConfig, own: Mapping[str, Any], key: str) -> Any:
    """The value of one key. A moved key may have been set under its own name; that value is newer."""
    value = None if key in _OVERWRITTEN else _get(config, key)
    if value is None and key in _MOVED:
        value = _get(own, key)
    if key == "metric.type" and isinstance(config.get("metric"), list):  # the Trainer makes it a list of sections
        types = [section["type"] for section in config["metric"]]
        value = types[0] if len(types) == 1 else types
    if key == "processor.tokenizer.type":
        value = CORE_TOKENIZERS.get(str(value), value)
    return value


def _get(section: Any, key: str) -> Any:
    """The value at a dotted key; None if a part is missing."""
    for name in key.split("."):
        if hasattr(section, "to_dict") and not isinstance(section, dict):  # MindFormers' parallel and recompute
            section = section.to_dict()
        section = section.get(name) if isinstance(section, Mapping) else None
    return section


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    *outer, name = key.split(".")
    for part in outer:
        section = section.setdefault(part, {})
    section[name] = value


def _same(value: Any, before: Any) -> bool:
    if isinstance(before, list):
        return (list(value) if isinstance(value, (list, tuple)) else [value]) == before
    return value == before


def _unknown_keys(config: MindFormerConfig) -> list[str]:
    """Problems for keys that neither glm_ms nor MindFormers has; at the top level, only near misses of a key."""
    known: dict[str, set[str]] = {}
    for key in leaf_keys():
        while key:
            section, _, name = key.rpartition(".")
            known.setdefault(section, set()).add(name)
            key = section
    top = known.pop("")
    problems = [
        f"{name}: unknown key{did_you_mean(name, top)}"
        for name in config
        if name not in top and name not in section_keys("") and did_you_mean(name, top)
    ]
    for section, names in known.items():
        value = _get(config, section)
        if section.split(".")[0] == "checkpoint" or not isinstance(value, Mapping):
            continue
        allowed = {*names, *section_keys(section), *_ADDED.get(section, "").split()}
        for name in value:
            if name not in allowed:
                hint = did_you_mean(name, names, f"; known here: {', '.join(sorted(names))}")
                problems.append(f"{section}.{name}: unknown key{hint}")
    return problems
