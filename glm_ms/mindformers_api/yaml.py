"""A YAML of this project as the MindFormerConfig that MindFormers makes of it, and back to checked settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mindformers import MindFormerConfig
from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

from glm_ms.mindformers_api.auto import ARCH
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.document import Entry, read_document
from glm_ms.settings.schema import leaf_keys
from glm_ms.settings.values import Converter
from glm_ms.storage.suggest import did_you_mean

# The section of a MindFormerConfig for what MindFormers would misread under its own name.
KEPT = "glm_ms"
TASK_TRAINER, DATASET_TASK = "GLMTextGenerationTrainer", "GLMDataset"
TOKENIZERS = {"ChatGLM2Tokenizer": "GLM2Tokenizer", "ChatGLM3Tokenizer": "GLM3Tokenizer"}
# Keys of ours that MindFormers resets (load_checkpoint, resume_training, the batch size of evaluations), refuses
# (max_steps), or has with another meaning (checkpoint).
_APART = (
    "load_checkpoint",
    "resume_training",
    "eval_dataset.batch_size",
    "runner_config.max_steps",
    "checkpoint.",
)
# What MindFormers adds to sections that are ours.
_ADDED = {
    "train_dataset": "auto_tune autotune_per_step batch_size do_eval filepath_prefix input_columns micro_batch_num "
    "mixup_op output_columns profile seed tokenizer",
    "eval_dataset": "auto_tune autotune_per_step batch_size do_eval filepath_prefix input_columns output_columns "
    "profile seed tokenizer",
    "model": "generation_config pretrained_model_dir",
    "model.model_config": "batch_size checkpoint_name_or_path disable_lazy_inline generation load_adapter name_or_path "
    "parallel_config tokenizer track_max_attention_logit",
    "runner_config": "global_batch_size initial_epoch initial_step mini_batch_size origin_epochs",
    "processor": "audio_processor image_processor type",
    "train_dataset.data_loader": "phase",
    "eval_dataset.data_loader": "phase",
}


def read_run_yaml(path: str | Path) -> Settings:
    """The settings of a YAML as they stand there: keys and values are checked, not yet whether they suffice for a job.

    Raises:
        SettingsError: unknown keys or unusable values, each with its line.
    """
    return _converted(read_document(path), str(path))


def install_reader() -> None:
    """Lets `MindFormerConfig("x.yaml")` understand YAMLs of this project.

    MindFormers reads every YAML itself, by this one static method, and offers no hook: it is replaced by one that
    hands all other files to the original. Safe to call again.
    """
    stock = MindFormerConfig.__dict__["_file2dict"].__func__
    if getattr(stock, "of_glm_ms", False):
        return

    def read(filename: str | None = None) -> dict[str, Any]:
        return mindformers_document(read_run_yaml(filename)) if is_run_yaml(filename) else stock(filename)

    read.of_glm_ms = True
    MindFormerConfig._file2dict = staticmethod(read)


def mindformers_document(settings: Settings) -> dict[str, Any]:
    """What a YAML of MindFormers would hold in place of ours: our keys at their names, the others' where needed."""
    whole = settings.to_dict()
    kept: dict[str, Any] = {"source": settings.source}
    for key in leaf_keys():
        if _is_apart(key):
            _put(kept, key, _pop(whole, key))
    whole["checkpoint"] = {}
    model = whole["model"]["model_config"]
    model.update(
        name_or_path=settings.source,
        checkpoint_name_or_path=kept["load_checkpoint"] or None,
        load_adapter=whole["load_adapter"],
        tokenizer=dict(whole["processor"]["tokenizer"]),
        generation=dict(whole["generation"]),
    )
    tokenizer = whole["processor"]["tokenizer"]
    tokenizer["type"] = TOKENIZERS[tokenizer["type"]]
    for part in ("train", "eval"):
        section = whole[f"{part}_dataset"]
        section.update(
            tokenizer=dict(tokenizer), batch_size=settings.runner_config.batch_size, seed=settings.seed
        )
        section["data_loader"]["phase"] = part  # without which MindFormers' own loader does not start
    whole["runner_config"].update(sink_mode=False, sink_size=-1)
    return {
        **whole,
        KEPT: kept,
        "load_checkpoint": None,
        "resume_training": None,
        "use_legacy": True,
        "trainer": {"type": TASK_TRAINER, "model_name": "common"},
        "train_dataset_task": {"type": DATASET_TASK, "dataset_config": whole["train_dataset"]},
        "eval_dataset_task": {
            "type": DATASET_TASK,
            "dataset_config": {**whole["eval_dataset"], "do_eval": True},
        },
    }


def settings_of(config: MindFormerConfig, **replaced: Any) -> Settings:
    """Settings from a MindFormerConfig made of a YAML of ours, with what was changed in it since.

    Args:
        config: `MindFormerConfig("x.yaml")`, or what the Trainer holds.
        replaced: values of top level keys that come before those of `config`.

    Raises:
        SettingsError: made of something else; unknown keys, unusable values, or a change to a key without meaning.
    """
    if not config.get(KEPT):
        raise SettingsError(
            "this configuration was not made from a YAML of glm_ms: its model.model_config.type must be GLMConfig; "
            "give Trainer(args=...) the path of such a YAML, or MindFormerConfig(path)"
        )
    if "overwrite_output_dir" in config:
        raise SettingsError(
            "Trainer(args=TrainingArguments(...)): not supported with glm_ms; give the path of a YAML, or "
            "MindFormerConfig(path) and change its keys in Python"
        )
    kept = config[KEPT]
    before = read_run_yaml(kept.source) if Path(kept.source).is_file() else Settings(source=kept.source)
    problems = _foreign(config)
    document = Entry({}, kept.source)
    for key in leaf_keys():
        value = replaced[key] if key in replaced else _value(config, kept, key)
        same = _same(value, _get(before, key))
        where = before.where(key) if same else f"{kept.source}, as changed in Python"
        _put_entry(document, key, _entry(value, where))
    if problems:
        raise SettingsError(problems)
    return _converted(document, kept.source)


def _converted(document: Entry, source: str) -> Settings:
    converter = Converter()
    settings = converter.section(Settings, document)
    settings.source, settings.origins = source, converter.origins
    if converter.problems:
        raise SettingsError(converter.problems)
    return settings


def is_run_yaml(filename: str | None) -> bool:
    """Whether a YAML is for the network of this project. What cannot be read is left to MindFormers' reader."""
    try:
        document = yaml.safe_load(Path(filename or "").read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return False
    kinds = []
    for section in ("model_config", "arch"):
        value = document
        for name in ("model", section, "type"):
            value = value.get(name) if isinstance(value, dict) else None
        kinds.append(value)
    return kinds[0] == "GLMConfig" or kinds[1] == ARCH


def _is_apart(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in _APART)


def _value(config: MindFormerConfig, kept: Mapping[str, Any], key: str) -> Any:
    """The value of one of our keys; what was set under its own name comes before what was kept apart."""
    apart = _is_apart(key)
    if apart and key in ("load_checkpoint", "resume_training", "eval_dataset.batch_size"):
        return _get(kept, key)  # under their own names these are MindFormers'
    value = _get(config, key)
    if value is None and apart:
        value = _get(kept, key)
    if key == "metric.type" and isinstance(
        config.get("metric"), list
    ):  # the Trainer makes a list of the section
        types = [section["type"] for section in config["metric"]]
        value = types[0] if len(types) == 1 else types
    if key == "processor.tokenizer.type":
        value = next((ours for ours, theirs in TOKENIZERS.items() if theirs == value), value)
    return value


def _get(section: Any, key: str) -> Any:
    for name in key.split("."):
        if hasattr(section, "to_dict") and not isinstance(
            section, dict
        ):  # parallel and recompute become objects
            section = section.to_dict()
        section = section.get(name) if isinstance(section, Mapping) else getattr(section, name, None)
    return section


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    *outer, name = key.split(".")
    for part in outer:
        section = section.setdefault(part, {})
    section[name] = value


def _pop(section: dict[str, Any], key: str) -> Any:
    *outer, name = key.split(".")
    for part in outer:
        section = section[part]
    return section.pop(name)


def _put_entry(document: Entry, key: str, entry: Entry) -> None:
    *outer, name = key.split(".")
    for part in outer:
        document = document.value.setdefault(part, Entry({}, entry.where))
    document.value[name] = entry


def _entry(value: Any, where: str) -> Entry:
    if isinstance(value, (list, tuple)):
        return Entry([_entry(item, where) for item in value], where, where)
    return Entry(value, where, where)


def _same(value: Any, before: Any) -> bool:
    if isinstance(before, list):
        return (list(value) if isinstance(value, (list, tuple)) else [value]) == before
    return value == before


def _foreign(config: MindFormerConfig) -> list[str]:
    """Keys in our sections that are neither ours nor MindFormers': misspelt ones."""
    top = {key.partition(".")[0] for key in leaf_keys()}
    theirs = {*CONFIG_NAME_TO_CLASS, *CONFIG_NAME_TO_CLASS["general_config"].keys()}
    problems = [
        f"{name}: unknown key{did_you_mean(name, top)}"
        for name in config
        if name not in top and name not in theirs and did_you_mean(name, top)
    ]
    sections: dict[str, set[str]] = {}
    for key in leaf_keys():
        section, _, name = key.rpartition(".")
        while section:
            sections.setdefault(section, set()).add(name)
            section, _, name = section.rpartition(".")
    for section, known in sections.items():
        value = _get(config, section)
        template = CONFIG_NAME_TO_CLASS.get(section)
        theirs = set(_ADDED.get(section, "").split()) | set(template.keys() if template else ())
        if section.split(".")[0] == "checkpoint" or not isinstance(value, Mapping):
            continue
        for name in value:
            if name not in known and name not in theirs:
                hint = did_you_mean(name, known, f"; known here: {', '.join(sorted(known))}")
                problems.append(f"{section}.{name}: unknown key{hint}")
    return problems
