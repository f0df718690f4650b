"""Configurations of MindFormers 1.0 to 1.3 in our names: what counts, what is said, what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from legacy_yaml import LORA, PTUNING, legacy_yaml

from glm_ms.settings import Settings, load_settings
from glm_ms.settings.legacy.table import LEGACY, LEGACY_DEFAULTS, Renamed
from glm_ms.settings.schema import leaf_keys

WEIGHTS = "load_checkpoint=base"
# What the file of legacy_yaml() means here, where that is not the default.
EXPECTED = {
    "run_mode": "finetune",
    "load_checkpoint": "",
    "context.device_target": "Ascend",
    "context.max_device_memory": "59GB",
    "parallel.parallel_mode": 1,
    "parallel.full_batch": True,
    "parallel.enable_parallel_optimizer": True,
    "parallel_config.data_parallel": 8,
    "model.model_config.seq_length": 193,
    "model.model_config.param_init_type": "float16",
    "model.model_config.compute_dtype": "float16",
    "processor.tokenizer.type": "ChatGLM2Tokenizer",
    "processor.tokenizer.vocab_file": "/path/to/tokenizer.model",
    "runner_config.batch_size": 8,
    "runner_wrapper.scale_sense.type": "DynamicLossScaleUpdateCell",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.weight_decay": 0.1,
    "lr_schedule.type": "PolynomialWithWarmUpLR",
    "lr_schedule.lr_end": 1e-6,
    "train_dataset.data_loader.dataset_dir": "/path/to/AdvertiseGen/train.json",
    "train_dataset.max_target_length": 128,
    "train_dataset.num_parallel_workers": 1,
    "eval_dataset.data_loader.dataset_dir": "/path/to/AdvertiseGen/dev.json",
    "eval_dataset.max_target_length": 128,
    "eval_dataset.batch_size": 1,
    "metric.type": ["PerplexityMetric"],
    "eval_step_interval": 1788,
    "eval_epoch_interval": -1,
    # 256, but no longer than seq_length; and no other limit.
    "generation.max_length": 193,
    "generation.max_new_tokens": 193,
    "checkpoint.save_steps": 1000,
    "checkpoint.keep_max": 2,
}


def value_of(settings: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        settings = getattr(settings, name)
    return settings


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of a parsed file; the callbacks of a list by their type."""
    if isinstance(node, list) and node and isinstance(node[0], dict):
        node = {item["type"]: {name: item[name] for name in item if name != "type"} for item in node}
    if isinstance(node, dict) and node:
        for name, inner in node.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path


def expanded(notes: list[str]) -> str:
    """The lines with `section.{one, two}` written out."""
    pattern = re.compile(r"([\w.]+)\.\{([^}]*)\}")
    return pattern.sub(lambda m: ", ".join(f"{m[1]}.{name}" for name in m[2].split(", ")), "\n".join(notes))


VARIANTS = {
    "finetune": {},
    "glm3": {"generation": 3},
    "lora": {"pet": LORA},
    "ptuning2": {"pet": PTUNING},
    "tools": {"generation": 3, "tools": True},
}


def test_every_value_of_the_file_counts(load_legacy) -> None:
    settings = load_legacy(legacy_yaml())
    default = Settings()
    differing = {
        key: value_of(settings, key) for key in leaf_keys() if value_of(settings, key) != value_of(default, key)
    }
    unchanged = {key for key, value in EXPECTED.items() if value == value_of(default, key)}
    assert differing == {key: value for key, value in EXPECTED.items() if key not in unchanged}
    assert settings.model.model_config.layernorm_epsilon == 1e-5  # text by the rules of YAML 1.1
    assert settings.where("optimizer.betas").startswith("old.yaml:")
    assert settings.where("generation.max_length").startswith("old.yaml:")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_no_key_is_dropped_in_silence(load_legacy, variant: dict[str, Any]) -> None:
    text = legacy_yaml(**variant)
    said = expanded(load_legacy(text, WEIGHTS).notes)
    for key in leaves(yaml.safe_load(text)):
        for whole in ("context.jit_config", "parallel.strategy_ckpt_config", "eval_callbacks"):
            key = whole if key.startswith(whole) else key
        for alias in ("train_dataset", "eval_dataset"):  # the task holds the same section again
            key = key.replace(f"{alias}_task.dataset_config", alias)
        rule = LEGACY.get(key.replace("CheckpointMointor", "CheckpointMonitor"))
        if rule is None:
            assert key in leaf_keys(), key
        elif not isinstance(rule, Renamed):
            assert re.search(rf"\b{re.escape(key)}\b", said), key
        elif rule.key != key and key.rpartition(".")[2] not in (
            "type",
            "vocab_file",
            "checkpoint_name_or_path",
        ):
            assert re.search(rf"\b{key.rpartition('.')[2]}\b", said), key


def test_each_group_of_names_has_one_line(load_legacy) -> None:
    notes = load_legacy(legacy_yaml()).notes
    lines = legacy_yaml().splitlines()

    def line(part: str, number: int = 1) -> str:
        """old.yaml:N of the n-th line that holds a text."""
        return f"old.yaml:{[i for i, text in enumerate(lines, 1) if part in text][number - 1]}"

    for note in (
        "old.yaml: a configuration of MindFormers; what its names mean here:",
        f"{line('ChatGLM2Config')}: model.model_config.type: ChatGLM2Config is GLMConfig here",
        f"{line('ChatGLM2For')}: model.arch.type: ChatGLM2ForConditionalGeneration is GLMForCausalLM here",
        f"{line('MFTrain')}: runner_wrapper.type: MFTrainOneStepCell is GLMTrainOneStep here",
        f"{line('polynomial')}: lr_schedule.type: polynomial is PolynomialWithWarmUpLR here",
        f"{line('beta1')}: optimizer.beta1 and beta2 are optimizer.betas here",
        f"{line('vocab_file', 2)}: train_dataset.tokenizer.vocab_file is processor.tokenizer.vocab_file here",
        f"{line('save_checkpoint_steps')}: callbacks.CheckpointMointor: save_checkpoint_steps (as save_steps), "
        "keep_checkpoint_max (as keep_max) belong to checkpoint here",
        f"{line('repetition_penalty')}: model.model_config: repetition_penalty, max_decode_length (as max_length) "
        "belong to generation here",
        f"{line('top_k')}: model.model_config.top_k: 1 keeps one token, so model.model_config.do_sample: True is "
        "greedy decoding here",
        f"{line('batch_size', 2)}: train_dataset.batch_size: 1 is overridden by runner_config.batch_size: 8 "
        f"({line('batch_size', 4).replace('old.yaml:', 'line ')})",
    ):
        assert notes.count(note) == 1, note
    assert len([note for note in notes if "no effect here" in note]) == 1
    assert len(notes) < 20
    optimizer = next(note for note in notes if "FP32StateAdamWeightDecay" in note)
    assert "is GLMAdamW here (AdamW with bias correction" in optimizer


def test_lora(load_legacy) -> None:
    settings = load_legacy(legacy_yaml(pet=LORA), WEIGHTS)
    pet = settings.model.pet_config
    assert (pet.pet_type, pet.lora_rank, pet.target_modules) == ("lora", 4, ".*query_key_value*")
    moved = "pet_type, lora_rank, lora_alpha, lora_dropout, target_modules belong to model.pet_config here"
    assert any(note.endswith(moved) for note in settings.notes)
    for spelling in ("model.pet_config.lora_rank=2", "model.model_config.pet_config.lora_rank=2"):
        assert load_legacy(legacy_yaml(pet=LORA), WEIGHTS, spelling).model.pet_config.lora_rank == 2
    base = load_legacy(legacy_yaml(pet=LORA), WEIGHTS, "model.pet_config.pet_type=null", "run_mode=eval")
    assert base.model.pet_config == Settings().model.pet_config
    assert "model.model_config.pet_config.{lora_rank, target_modules" in base.notes[-1].replace(
        "lora_alpha, lora_dropout, ", ""
    )


def test_ptuning2(load_legacy, legacy_refused) -> None:
    text = legacy_yaml(("pre_seq_len: None", "pre_seq_len: 128"), pet=PTUNING)
    settings = load_legacy(text, WEIGHTS)
    pet = settings.model.pet_config
    assert (pet.pet_type, pet.pre_seq_len, pet.projection_dim, pet.dropout_prob) == (
        "ptuning2",
        128,
        128,
        0.0,
    )
    assert any("ChatGLM2WithPtuning2 is GLMForCausalLM here" in note for note in settings.notes)
    assert load_legacy(legacy_yaml(pet=PTUNING), WEIGHTS) == settings  # pre_seq_len: None leaves it to pet_config
    assert "pre_seq_len: 128: a prefix needs" in legacy_refused(legacy_yaml(("pre_seq_len: None", "pre_seq_len: 128")))
    orphan = legacy_yaml(("ChatGLM2ForConditionalGeneration", "ChatGLM2WithPtuning2"))
    assert "model.arch.type: ChatGLM2WithPtuning2: needs" in legacy_refused(orphan)


def test_conversations_with_tools(load_legacy) -> None:
    settings = load_legacy(legacy_yaml(generation=3, tools=True))
    assert settings.train_dataset.data_loader.type == "ToolAlpacaDataLoader"
    assert settings.train_dataset.max_seq_length == settings.model.model_config.seq_length == 193
    assert settings.processor.tokenizer.type == "ChatGLM3Tokenizer"


def test_rows_of_glm3_differ_and_that_is_said(load_legacy) -> None:
    settings = load_legacy(legacy_yaml(generation=3))
    assert settings.processor.tokenizer.type == "ChatGLM3Tokenizer"
    assert settings.checkpoint.save_steps == 1000
    assert any("data_loader.version: 3: there the answer follows the bare prompt" in note for note in settings.notes)


@pytest.mark.parametrize("spelling", ["checkpoint.keep_max", "callbacks.CheckpointMointor.keep_checkpoint_max"])
def test_command_line_has_the_last_word_in_our_spelling(load_legacy, legacy_refused, spelling: str) -> None:
    if spelling.startswith("callbacks"):  # a list cannot be reached into
        assert "callbacks is not a section" in legacy_refused(legacy_yaml(), f"{spelling}=5")
    else:
        assert load_legacy(legacy_yaml(), f"{spelling}=5").checkpoint.keep_max == 5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.betas=[0.8,0.99]", "optimizer.betas", [0.8, 0.99]),
        ("optimizer.beta2=0.99", "optimizer.betas", [0.9, 0.99]),
        ("optimizer.type=AdamW", "optimizer.type", "GLMAdamW"),
        ("optimizer.type=GLMAdamW", "optimizer.type", "GLMAdamW"),
        ("lr_schedule.type=cosine", "lr_schedule.type", "CosineWithWarmUpLR"),
        ("lr_schedule.type=constant_with_warmup", "lr_schedule.type", "ConstantWarmUpLR"),
        ("lr_schedule.type=LinearWithWarmUpLR", "lr_schedule.type", "LinearWithWarmUpLR"),
        ("train_dataset.batch_size=3", "runner_config.batch_size", 3),
        ("runner_config.batch_size=3", "runner_config.batch_size", 3),
        ("eval_dataset.tokenizer.vocab_file=v", "processor.tokenizer.vocab_file", "v"),
        ("processor.tokenizer.vocab_file=v", "processor.tokenizer.vocab_file", "v"),
        ("train_dataset_task.dataset_config.max_source_length=64", "train_dataset.max_source_length", 64),
        ("model.model_config.max_decode_length=90", "generation.max_length", 90),
        ("model.model_config.max_length=90", "generation.max_length", 90),
        ("generation.max_length=90", "generation.max_length", 90),
        ("generation.max_new_tokens=7", "generation.max_new_tokens", 7),
        ("model.model_config.num_layers=2", "model.model_config.num_layers", 2),
        ("runner_wrapper.scale_sense=1.0", "runner_wrapper.scale_sense.type", None),
        ("runner_wrapper.scale_sense.type=null", "runner_wrapper.scale_sense.type", None),
        ("load_checkpoint=base", "load_checkpoint", "base"),
        ("model.model_config.checkpoint_name_or_path=base", "load_checkpoint", "base"),
        ("model.model_config.batch_size=4", "predict_batch_size", 4),
    ],
)
def test_command_line_wins_in_either_spelling(load_legacy, override: str, key: str, value: Any) -> None:
    assert value_of(load_legacy(legacy_yaml(), override), key) == value


def test_flags_win_too(load_legacy) -> None:
    flags = {"epochs": "3", "batch_size": "5", "train_dataset": "a.json", "run_mode": "finetune"}
    settings = load_legacy(legacy_yaml(), flags=flags)
    assert (settings.runner_config.epochs, settings.runner_config.batch_size) == (3, 5)
    assert settings.train_dataset.data_loader.dataset_dir == "a.json"
    assert not any("train_dataset.batch_size: 1 is overridden" in note for note in settings.notes)


def test_names_of_the_online_zoo_are_no_paths(load_legacy, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_legacy(legacy_yaml())
    assert (settings.load_checkpoint, settings.run_mode) == ("", "finetune")
    said = [note for note in settings.notes if "online zoo" in note]
    assert len(said) == 1
    assert said[0].startswith("old.yaml:4: load_checkpoint: glm2_6b is a model of MindFormers' online zoo")
    assert "--load_checkpoint PATH" in said[0]
    assert settings.where("load_checkpoint") == "old.yaml:4 (glm2_6b of MindFormers' online zoo)"
    only_model = legacy_yaml(("load_checkpoint: 'glm2_6b'", "load_checkpoint: ''"))
    assert "checkpoint_name_or_path: glm2_6b is" in "\n".join(load_legacy(only_model).notes)
    given = load_legacy(legacy_yaml(), WEIGHTS)
    assert (given.load_checkpoint, given.run_mode) == ("base", "train")
    assert not any("online zoo" in note for note in given.notes)
    empty = load_legacy(legacy_yaml(), flags={"load_checkpoint": ""})
    assert (empty.load_checkpoint, empty.run_mode) == ("", "train")
    path = legacy_yaml(("load_checkpoint: 'glm2_6b'", "load_checkpoint: '/a/b.ckpt'"))
    assert load_legacy(path).load_checkpoint == "/a/b.ckpt"
    Path("glm2_6b").mkdir()
    assert load_legacy(legacy_yaml()).load_checkpoint == "glm2_6b"


def test_resuming_means_the_checkpoint_that_is_named(load_legacy) -> None:
    text = legacy_yaml(("resume_training: False", "resume_training: True"))
    assert load_legacy(text, "load_checkpoint=base").resume_training == "base"
    assert load_legacy(text).resume_training is True
    assert load_legacy(legacy_yaml(), "load_checkpoint=base", "resume_training=True").resume_training is True


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ((), (), (False, 0, 1.0)),
        ((("top_k: 1\n", "top_k: 3\n"),), (), (True, 3, 1.0)),
        ((("    top_k: 1\n", ""),), (), (True, 50, 1.0)),
        ((("do_sample: True", "do_sample: False"), ("top_p: 1", "top_p: 0.7")), (), (False, 0, 1.0)),
        ((), ("model.model_config.top_k=20", "model.model_config.top_p=0.7"), (True, 20, 0.7)),
        ((), ("generation.do_sample=True", "generation.top_k=9"), (True, 9, 1.0)),
        ((), ("generation.do_sample=True",), (True, 1, 1.0)),
        ((), ("generation.num_beams=2",), (False, 0, 1.0)),
    ],
)
def test_sampling(load_legacy, changes: tuple, overrides: tuple, expected: tuple) -> None:
    generation = load_legacy(legacy_yaml(*changes), *overrides).generation
    assert (generation.do_sample, generation.top_k, generation.top_p) == expected


def test_lengths(load_legacy) -> None:
    both = legacy_yaml(("max_decode_length: 256", "max_decode_length: 256\n    max_length: 100"))
    settings = load_legacy(both)
    assert (settings.generation.max_length, settings.generation.max_new_tokens) == (100, 100)
    assert any(
        "max_decode_length: 256 is overridden by model.model_config.max_length: 100" in n for n in settings.notes
    )
    capped = load_legacy(legacy_yaml(), WEIGHTS, "run_mode=eval", "metric.type=ADGENMetric")
    assert capped.generation.max_length == 193
    assert any("is more than model.model_config.seq_length: 193, which counts" in note for note in capped.notes)
    # There a prompt may fill the network, so that only its length decides; see generation.max_length.
    load_legacy(legacy_yaml(("max_source_length: 64", "max_source_length: 193")), WEIGHTS, "run_mode=eval",
         "metric.type=ADGENMetric")  # fmt: skip


def test_number_as_loss_scale(load_legacy) -> None:
    section = legacy_yaml().split("  scale_sense:\n")[1].split("  use_clip")[0]
    text = legacy_yaml((f"  scale_sense:\n{section}", "  scale_sense: 1024.0\n"))
    scale = load_legacy(text).runner_wrapper.scale_sense
    assert (scale.type, scale.loss_scale_value) == ("FixedLossScaleUpdateCell", 1024.0)
    scale = load_legacy(text.replace("1024.0", "1.0")).runner_wrapper.scale_sense
    assert scale == Settings().runner_wrapper.scale_sense


def test_schedules_ignore_what_they_do_not_know(load_legacy) -> None:
    linear = load_legacy(legacy_yaml(("type: polynomial", "type: linear")))
    assert (linear.lr_schedule.type, linear.lr_schedule.lr_end) == ("LinearWithWarmUpLR", 0.0)
    assert "lr_schedule.lr_end (lr_schedule has type LinearWithWarmUpLR)" in "\n".join(linear.notes)
    ratio = load_legacy(legacy_yaml(("warmup_steps: 0", "warmup_steps: 10\n  warmup_ratio: 0.1")))
    assert (ratio.lr_schedule.warmup_steps, ratio.lr_schedule.warmup_ratio) == (0, 0.1)
    section = legacy_yaml().split("lr_schedule:\n")[1].split("layer_scale")[0]
    constant = legacy_yaml((f"lr_schedule:\n{section}", ""), ("  eps: 1.e-8", "  eps: 1.e-8\n  learning_rate: 1.e-4"))
    schedule = load_legacy(constant).lr_schedule
    assert (schedule.type, schedule.learning_rate) == ("ConstantWarmUpLR", 1e-4)


def test_defaults_are_those_of_mindformers(load_legacy) -> None:
    text = legacy_yaml(
        ("  eps: 1.e-8\n  weight_decay: 0.1\n", ""), ("  use_clip_grad: True\n", ""),
        ('    param_init_type: "float16"\n    compute_dtype: "float16"\n', "")
    )  # fmt: skip
    settings = load_legacy(text)
    assert settings.optimizer.eps == 1e-6
    assert settings.optimizer.weight_decay == 0.0
    assert settings.runner_wrapper.use_clip_grad is False
    assert settings.model.model_config.compute_dtype == "float16"
    line = next(note for note in settings.notes if "MindFormers' defaults count" in note)
    assert all(f"{key}: {value}" in line for key, value in LEGACY_DEFAULTS.items())


def test_data_parallel_files(load_legacy) -> None:
    text = legacy_yaml(("parallel_mode: 1", "parallel_mode: 0"), ("use_parallel: False", "use_parallel: True"))
    settings = load_legacy(text)
    assert settings.parallel.full_batch is False
    assert any("gradients_mean: False sums the gradients of the cards there" in note for note in settings.notes)


def test_tokenizers_of_the_run_mode(load_legacy) -> None:
    text = legacy_yaml(('# vocab_file: "/path', 'vocab_file: "/other'))
    assert load_legacy(text).processor.tokenizer.vocab_file == "/path/to/tokenizer.model"
    predict = load_legacy(text, "run_mode=predict", "predict_data=x")
    assert predict.processor.tokenizer.vocab_file == "/other/to/tokenizer.model"
    assert any("is overridden by processor.tokenizer.vocab_file" in note for note in predict.notes)


def test_a_dataset_task_of_its_own_gives_way(load_legacy) -> None:
    text = legacy_yaml(("dataset_config: *train_dataset", "dataset_config: {max_source_length: 9}"))
    settings = load_legacy(text)
    assert settings.train_dataset.max_source_length == 64
    assert any("dataset_config.max_source_length: 9 is overridden by train_dataset" in n for n in settings.notes)


def test_what_is_missing_but_harmless_is_said(load_legacy) -> None:
    settings = load_legacy(
        legacy_yaml(("profile: False", "profile: True"), ("auto_trans_ckpt: False", "auto_trans_ckpt: True"))
    )
    assert any("profile: True: there is no profiler; the run continues without" in note for note in settings.notes)
    assert "auto_trans_ckpt" in settings.notes[-1]


def test_settings_are_written_in_our_names(load_legacy) -> None:
    settings = load_legacy(legacy_yaml(pet=LORA), WEIGHTS)
    Path("settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    again = load_settings("settings.yaml", check_files=False)
    assert again == settings
    assert again.notes == []


def test_keys_of_codegeex2_and_of_the_32k_models(load_legacy, legacy_refused) -> None:
    codegeex = legacy_yaml(
        ("    hidden_size: 4096\n", "    hidden_size: 4096\n    interleaved_qkv: False\n    rotary_percent: 0.5\n"),
        ("  expert_parallel: 1\n", "  expert_parallel: 1\n  optimizer_shard: True\n"),
        ("  - type: MFLossMonitor\n",
         "  - type: MFLossMonitor\n  - type: SummaryMonitor\n    keep_default_action: True\n"),
    )  # fmt: skip
    settings = load_legacy(codegeex)
    assert "interleaved_qkv" in settings.notes[-1]
    assert "optimizer_shard (parallel.enable_parallel_optimizer decides it)" in settings.notes[-1]
    assert "rotary_percent: 0.25: half of each head" in legacy_refused(
        codegeex.replace("rotary_percent: 0.5", "rotary_percent: 0.25")
    )
    template = "[gMASK]sop{% for message in messages %}...{% endfor %}"
    longer = legacy_yaml(
        ("type: ChatGLM2Config", "type: ChatGLM32kConfig"), ("rope_ratio: 1\n", "rope_ratio: 50\n"),
        ("ChatGLM2ForConditionalGeneration", "ChatGLM32kForConditionalGeneration"),
        ("ChatGLM3Tokenizer", "ChatGLM32kTokenizer"), ("no_recompute_layers: None", "no_recompute_layers: [20]"),
        ("    bos_token: '<sop>'\n", f"    bos_token: '<sop>'\n    chat_template: \"{template}\"\n"),
        ("  gradient_aggregation_group: 4", "  use_seq_parallel: False\n  gradient_aggregation_group: 4"),
        generation=3,
    )  # fmt: skip
    settings = load_legacy(longer)
    assert settings.processor.tokenizer.type == "ChatGLM3Tokenizer"
    assert settings.model.model_config.rope_ratio == 50
    said = "\n".join(settings.notes)
    assert "model.arch.type: ChatGLM32kForConditionalGeneration is GLMForCausalLM here" in said
    assert "ChatGLM32kTokenizer is ChatGLM3Tokenizer here" in said
    assert "chat_template (the tokenizer class has the chat template)" in said
