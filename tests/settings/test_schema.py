"""The schema itself, and settings written back to YAML."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from glm_ms.model.config import GLMConfig
from glm_ms.peft import ADAPTERS
from glm_ms.settings import FLAGS, Settings, load_settings
from glm_ms.settings.schema import BATCH_SIZE_KEYS, allowed, leaf_keys, used_with

# Keys whose other values depend on further keys.
_COMPANIONS = {
    "model.quantization_bit": ["model.pet_config.pet_type=lora", "load_checkpoint=data"],
    "model.quantization_group": ["model.quantization_bit=4", "model.pet_config.pet_type=lora", "load_checkpoint=data"],
    "lr_schedule.lr_end": ["lr_schedule.type=CosineWithWarmUpLR", "lr_schedule.learning_rate=8"],
    "lr_schedule.num_cycles": ["lr_schedule.type=CosineWithWarmUpLR"],
    "lr_schedule.power": ["lr_schedule.type=PolynomialWithWarmUpLR"],
    "train_dataset.max_source_length": ["model.model_config.seq_length=193"],
    "train_dataset.max_target_length": ["model.model_config.seq_length=193"],
    "train_dataset.ignore_pad_token_for_loss": ["processor.tokenizer.type=ChatGLM2Tokenizer"],
    "train_dataset.max_seq_length": ["train_dataset.data_loader.type=ToolAlpacaDataLoader"],
    "eval_dataset.max_seq_length": ["eval_dataset.data_loader.type=ToolAlpacaDataLoader"],
    "model.init": ["load_checkpoint=data"],
    "generation.num_return_sequences": ["generation.do_sample=True"],
    "checkpoint.best_metric": ["do_eval=True"],
    "load_adapter": ["load_checkpoint=data", "model.pet_config.pet_type=lora"],
    "resume": ["run_mode=eval", "load_checkpoint=data"],
    "model.pet_config.pet_type": ["load_checkpoint=data"],
    **{
        f"model.pet_config.{name}": ["load_checkpoint=data", f"model.pet_config.pet_type={kind}"]
        for kind, adapter in ADAPTERS.items()
        for name in adapter.keys
    },
    **{
        f"runner_wrapper.scale_sense.{name}": ["runner_wrapper.scale_sense.type=DynamicLossScaleUpdateCell"]
        for name in ("loss_scale_value", "scale_factor", "scale_window")
    },
}
# Keys for which the rule below (another value of the same kind) makes no usable one.
_OTHER = {
    "model.model_config.kv_channels": 64,
    "model.model_config.num_attention_heads": 16,
    "model.model_config.multi_query_group_num": 4,
    "model.model_config.param_init_type": "float16",
    "model.model_config.compute_dtype": "bfloat16",
    "model.model_config.seq_length": None,  # tied to the lengths of train_dataset, changed with them
    "train_dataset.num_parallel_workers": None,  # depends on the machine, see test_loader
    "train_dataset.max_seq_length": 192,
    "eval_dataset.max_seq_length": 100,
    "lr_schedule.total_steps": 50,
    "lr_schedule.power": 2.0,
    "lr_schedule.num_cycles": 1.5,
    "lr_schedule.warmup_ratio": 0.25,
    "optimizer.betas": [0.5, 0.75],
    "generation.top_p": 0.5,
    "generation.min_p": 0.5,
    "generation.presence_penalty": 0.5,
    "generation.frequency_penalty": -0.5,
    "generation.logit_bias": ["100:-5", "7:2.5"],
    "generation.max_length": 100,
    "model.model_config.hidden_dropout": 0.5,
    "model.model_config.attention_dropout": 0.5,
    "context.max_device_memory": "30.5GB",
    "train_dataset.data_loader.dataset_dir": "data/dev.json",
    "eval_dataset.data_loader.dataset_dir": "data/train.json",
    "processor.tokenizer.vocab_file": "data/dev.json",
    "load_checkpoint": "data",
    "load_adapter": "data",
    "eval_step_interval": 5,
}


def _hint(dotted: str) -> Any:
    kind: Any = Settings
    for name in dotted.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def _choices(dotted: str) -> list[Any]:
    """The allowed values of a key that has a list of them."""
    field = leaf_keys()[dotted]
    if "choices" in field.metadata:
        return list(allowed(field))
    hint = _hint(dotted)
    if hint is bool:
        return [True, False]
    inner = next((item for item in get_args(hint) if get_origin(item) is Literal), hint)
    return list(get_args(inner)) if get_origin(inner) is Literal else []


def _get(settings: Settings, dotted: str) -> Any:
    value: Any = settings
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _other_value(dotted: str, present: Any) -> Any:
    """A value of the key that differs from `present`, or None where there is no other."""
    if dotted in _OTHER:
        return _OTHER[dotted]
    hint, choices = _hint(dotted), _choices(dotted)
    if get_origin(hint) is Union:
        hint = next(item for item in get_args(hint) if item is not type(None))
    if get_origin(hint) is list:
        return choices or ["question", "answer"]
    if choices:
        return next((choice for choice in choices if choice != present), None)
    if hint is bool:
        return not present
    if hint is str:
        return "other"
    return (present or 0) + 1 if hint is int else (present or 0) * 0.5 + 0.25


def _as_text(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


@pytest.mark.parametrize("dotted", list(leaf_keys()))
def test_override_of_every_key_round_trips(dotted: str, config: Path) -> None:
    before = load_settings(config)
    value = _other_value(dotted, _get(before, dotted))
    overrides = _COMPANIONS.get(dotted, [])
    if value is None:
        value = _get(before, dotted)
    else:
        assert value != _get(before, dotted)
    settings = load_settings(config, [*overrides, f"{dotted}={_as_text(value)}"])
    assert _get(settings, dotted) == value
    assert type(_get(settings, dotted)) is type(value)
    assert settings.where(dotted).startswith("command line")
    written = Path("effective.yaml")
    written.write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(written) == settings


def test_every_key_is_documented() -> None:
    for dotted, field in leaf_keys().items():
        assert len(field.metadata["doc"]) > 8, dotted
    assert set(_COMPANIONS) | set(_OTHER) <= set(leaf_keys())


def test_model_config_has_the_fields_of_glm_config() -> None:
    prefix = "model.model_config."
    names = [name[len(prefix) :] for name in leaf_keys() if name.startswith(prefix)]
    assert names == ["type"] + [field.name for field in dataclasses.fields(GLMConfig)]
    assert Settings().glm_config() == GLMConfig()


def test_tables_name_existing_keys() -> None:
    leaves = leaf_keys()
    assert {flag.key for flag in FLAGS.values() if flag.key} <= set(leaves)
    assert set(BATCH_SIZE_KEYS.values()) <= set(leaves)
    assert set(BATCH_SIZE_KEYS) == set(get_args(_hint("run_mode")))
    for dotted, field in leaves.items():
        if "used_with" in field.metadata:
            other, values = used_with(field)
            assert set(values) <= set(_choices(f"{dotted.rpartition('.')[0]}.{other}")), dotted


def test_text_that_looks_like_something_else_round_trips(config: Path) -> None:
    for text in ("123", "yes", "null", "a: b # c", "-", " 类型#裙 \n第二行", '"quoted"', "1e-5", "[a"):
        settings = load_settings(config, [f"predict_data={text}"])
        assert settings.predict_data == text
        Path("effective.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        assert load_settings("effective.yaml").predict_data == text


def test_settings_import_neither_mindspore_nor_numpy(repository: Path) -> None:
    code = (
        "import sys, glm_ms.settings\n"
        "print([name for name in ('mindspore', 'mindformers', 'numpy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
