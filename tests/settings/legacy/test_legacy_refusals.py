"""What of MindFormers' configurations is refused, and which files count as theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from legacy_yaml import legacy_yaml

from glm_ms.settings import Settings, SettingsError, load_settings
from glm_ms.settings.legacy.table import LEGACY, LEGACY_DEFAULTS, Refused, Renamed
from glm_ms.settings.legacy.translate import is_legacy
from glm_ms.settings.schema import leaf_keys
from glm_ms.storage.yaml_tree import read_yaml

OTHERS = (
    "use_past: True, checkpoint_name_or_path: data, batch_size: 2, top_p: 3, pre_seq_len: 'None', quantization_bit: ''"
)
DATA_KEYS = """tokenizer: {type: ChatGLM3Tokenizer, vocab_file: other}
  input_columns: [input_ids, labels]
  batch_size: 3"""

REFUSED = [
    (("quantization_bit: 0", "quantization_bit: 8"), ["quantization_bit: 8", "set it to 0"]),
    (("micro_batch_interleave_num: 1", "micro_batch_interleave_num: 2"), ["interleave_num: 2", "set it to 1"]),
    (("expert_num: 1", "expert_num: 8"), ["moe_config.expert_num: 8", "no experts"]),
    (("lr_scale: False", "lr_scale: True"), ["lr_scale: True", "lr_schedule.learning_rate"]),
    (("layer_scale: False", "layer_scale: True"), ["layer_scale: True", "same learning rate"]),
    (("only_save_strategy: False", "only_save_strategy: True"), ["only_save_strategy: True"]),
    (("src_strategy_path_or_dir: ''", "src_strategy_path_or_dir: ./s"), ["src_strategy_path_or_dir: ./s", "merge"]),
    (("CausalLanguageModelingTrainer", "TranslationTrainer"), ["trainer.type: TranslationTrainer", "only Causal"]),
    (("type: KeyWordGenDataset", "type: TranslationDataset"), ["train_dataset_task.type: TranslationDataset"]),
    (("repeat: 1", "repeat: 3"), ["train_dataset.repeat: 3", "runner_config.epochs"]),
    (("version: 2", "version: 1"), ["data_loader.version: 1", "versions 2 and 3"]),
    (("eos_token: '<eop>'", "eos_token: '<x>'"), ["processor.tokenizer.eos_token: <x>", "fixed"]),
    (("warmup_steps: 0", "warmup_epochs: 1"), ["lr_schedule.warmup_epochs: 1", "warmup_ratio"]),
    (("total_steps: -1", "warmup_lr_init: 1.e-6"), ["warmup_lr_init: 1e-06", "begins at 0"]),
    (("type: FP32StateAdamWeightDecay", "type: Lion"), ["optimizer.type", "'Lion'", "allowed: GLMAdamW"]),
    (("type: polynomial", "type: cosine_with_restarts"), ["lr_schedule.type", "cosine_with_restarts"]),
    (("type: ChatGLM2Config", "type: LlamaConfig"), ["model.model_config.type: LlamaConfig: another network"]),
    (("type: ADGenDataLoader", "type: MindDataset"), ["data_loader.type", "'MindDataset'"]),
    (("parallel_mode: 1", "parallel_mode: 2"), ["parallel.parallel_mode", "allowed: 0, 1"]),
    (("keep_checkpoint_max", "keep_checkpoint_maxx"), ["CheckpointMointor.keep_checkpoint_maxx: unknown key", "did"]),
    (("MFLossMonitor", "EvalCallBack"), ["callbacks.EvalCallBack: unknown key"]),
    (("  - type: MFLossMonitor", "  - MFLossMonitor"), ["callbacks: expected `- type: NAME`"]),
    (("MFLossMonitor", "ObsMonitor"), ["callbacks: ObsMonitor is given twice"]),
    (("use_past:", "use_pst:"), ["model.model_config.use_pst: unknown key; did you mean use_past"]),
    (("max_decode_length:", "max_decode_lenth:"), ["max_decode_lenth: unknown key; did you mean max_decode_length"]),
    (("num_layers:", "num_layer:"), ["num_layer: unknown key; did you mean num_layers"]),
    (("layer_decay:", "layer_deca:"), ["layer_deca: unknown key; did you mean layer_decay"]),
    (("sink_size: 4", "max_source_length: 4"), ["runner_config.max_source_length: unknown key; the key is train"]),
    (("  sink_size: 4", "  zzz: 4"), ["runner_config.zzz: unknown key; known here: batch_size, epochs"]),
    (("moe_config:\n", "moe_config: 3\nmoe_confg:\n"), ["moe_config: expected a section, found 3"]),
    (("beta1: 0.9", "beta1: big"), ["optimizer.betas", "'big'"]),
    (("run_mode: 'train'", "run_mode: [train]"), ["run_mode", "a list of 1"]),
    (("save_checkpoint_steps: 1000", "save_checkpoint_steps: 0"), ["checkpoint.save_steps: found 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "parts"), REFUSED, ids=[change[1] for change, _ in REFUSED])
def test_what_would_change_the_result_is_refused(legacy_refused, change: tuple[str, str], parts: list[str]) -> None:
    message = legacy_refused(legacy_yaml(change))
    for part in parts:
        assert part in message
    assert all(line.startswith("old.yaml:") for line in message.splitlines())


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.betas=[0.8,0.99]", "optimizer.beta2=0.9"),
        ("processor.tokenizer.vocab_file=a", "train_dataset.tokenizer.vocab_file=b"),
        ("generation.max_length=90", "model.model_config.max_length=91"),
    ],
)
def test_two_spellings_on_the_command_line_must_agree(load_legacy, legacy_refused, overrides: tuple[str, str]) -> None:
    message = legacy_refused(legacy_yaml(), *overrides)
    assert "both mean" in message
    assert "keep one of them" in message
    same = ("train_dataset.tokenizer.vocab_file=b", "eval_dataset.tokenizer.vocab_file=b")
    assert load_legacy(legacy_yaml(), *same).processor.tokenizer.vocab_file == "b"


def test_files_for_exports(legacy_refused, load_legacy) -> None:
    infer = legacy_yaml(("run_mode: 'train'\n", "infer:\n  prefill_model_path: a.mindir\n  infer_seq_length: 512\n"))
    message = legacy_refused(infer)
    assert "infer: a file for an export, without a run_mode; add --run_mode export" in message
    load_legacy(infer, "run_mode=predict", "predict_data=x")
    settings = load_legacy(infer, "run_mode=export", "predict_batch_size=2")
    assert (settings.run_mode, settings.batch_size()) == ("export", 2)
    assert "infer (an export writes into output_dir" in "\n".join(settings.notes)
    assert load_legacy(legacy_yaml(("run_mode: 'train'", "run_mode: 'export'"))).run_mode == "export"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("callbacks: [{type: MFLossMonitr}]", "callbacks.MFLossMonitr: unknown key; did you mean MFLossMonitor"),
        ("callbacks: 5", "callbacks: expected a section"),
        ("trainer: {type: Trainer}", "trainer.type: Trainer: only CausalLanguageModelingTrainer"),
        ("moe_config: {expert_num: 8}", "moe_config.expert_num: 8: .*no experts"),
        ("eval_dataset_task: {type: KeyWordGenDatset}", "eval_dataset_task.type: KeyWordGenDatset: known are"),
        ("runner_wrapper: {type: MFTrainOneStepCell}", "allowed: GLMTrainOneStep"),
        ("lr_schedule: {type: cosine}", "lr_schedule.type"),
        ("micro_batch_interleave_num: 2", "micro_batch_interleave_num: 2: set it to 1"),
        ("parallel_config: {expert_parallel: 8}", "parallel_config.expert_parallel: 8: .*no experts"),
        ("optimizer: {beta3: 0.9}", "optimizer.beta3: unknown key"),
        ("runner_wrapper: {scale_sens: 1}", "scale_sens: unknown key; did you mean scale_sense"),
        ("eval_dataset: {tokenizer: {vocab: x}, data_loader: {dataset_dir: data/dev.json}}",
         "eval_dataset.tokenizer.vocab: unknown key; did you mean vocab_file"),
    ],
)  # fmt: skip
def test_what_our_files_do_not_take_from_others(text: str, part: str, config: Path) -> None:
    ours = config.read_text(encoding="utf-8")
    if text.startswith("eval_dataset"):
        ours = ours[: ours.index("eval_dataset")]
    config.write_text(f"{ours}{text}\n", encoding="utf-8")
    assert not is_legacy(read_yaml(config))
    with pytest.raises(SettingsError, match=part) as caught:
        load_settings(config)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "text",
    ["callbacks: []", "trainer: {}", "infer: {}", "optimizer: {type: FusedAdamWeightDecay}",
     "runner_wrapper: {type: MFTrainOneStepCell}", "model: {model_config: {type: ChatGLM2Config}}"]
)  # fmt: skip
def test_one_sign_is_enough(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sign.yaml"
    path.write_text(f"{text}\nseed: 1\n", encoding="utf-8")
    assert is_legacy(read_yaml(path))
    path.write_text("seed: 1\nlr_schedule: {type: cosine}\n", encoding="utf-8")
    assert not is_legacy(read_yaml(path))


def test_other_networks_are_refused_in_one_line(legacy_refused) -> None:
    for change in (
        ("ChatGLM2ForConditionalGeneration", "LlamaForCausalLM"),
        ("ChatGLM2ForConditionalGeneration", "GLMForPreTraining"),
    ):
        message = legacy_refused(legacy_yaml(("type: ChatGLM2Config", "type: GLMConfig"), change, ("use_past", "x")))
        assert len(message.splitlines()) == 1
        assert f"model.arch.type: {change[1]}: another network" in message
    misspelt = legacy_yaml(("type: ChatGLM2Config", "type: ChatGLM2Confg"))
    assert "did you mean ChatGLM2Config" in legacy_refused(misspelt)


def test_table_leads_to_keys_that_exist() -> None:
    known = {*leaf_keys()}
    for name, rule in LEGACY.items():
        if isinstance(rule, Renamed):
            assert rule.key in known, name
            assert name not in known or rule.key == name, name
        else:
            assert name not in known, name
            assert rule.reason, name
        assert not isinstance(rule, Refused) or (rule.remedy and rule.unless), name
    assert set(LEGACY_DEFAULTS) <= known


def test_keys_of_mindformers_in_our_files(config: Path) -> None:
    text = config.read_text(encoding="utf-8").replace("seq_length: 192", f"seq_length: 192, {OTHERS}")
    text = text.replace("num_parallel_workers: 1", f"num_parallel_workers: 1\n  {DATA_KEYS}")
    text += "parallel_config: {expert_parallel: 1}\noptimizer: {beta1: 0.8, learning_rate: 1.e-3}\n"
    text += "parallel: {strategy_ckpt_config: {save_file: a, only_trainable_params: False}}\n"
    config.write_text(text, encoding="utf-8")
    settings = load_settings(config, ["model.model_config.batch_size=4"])
    assert settings.load_checkpoint == "data"
    assert (settings.predict_batch_size, settings.runner_config.batch_size) == (4, 3)
    assert settings.optimizer.betas == [0.8, 0.999]
    assert (settings.lr_schedule.type, settings.lr_schedule.learning_rate) == ("ConstantWarmUpLR", 1e-3)
    assert settings.generation == Settings().generation
    assert settings.processor.tokenizer.vocab_file == "tokenizer.model"
    assert settings.optimizer.eps == 1e-8  # our default, not MindFormers'
    notes = "\n".join(settings.notes)
    for part in (
        "run.yaml: keys of MindFormers; what they mean here:", "run.yaml:13: train_dataset.batch_size is runner_config",
        "train_dataset.tokenizer.vocab_file: other is overridden by processor.tokenizer.vocab_file: tokenizer.model",
        "model.model_config.use_past (every generation has",
        "model.model_config.top_p (decoding is greedy)", "train_dataset.input_columns (the way",
        "parallel.strategy_ckpt_config (", "parallel_config.expert_parallel (the network has no experts)",
    ):  # fmt: skip
        assert part in notes
    assert load_settings(config, ["runner_config.batch_size=5"]).runner_config.batch_size == 5


def test_a_number_as_loss_scale_in_our_files(config: Path) -> None:
    with config.open("a", encoding="utf-8") as file:
        file.write("runner_wrapper: {scale_sense: 1024}\n")
    scale = load_settings(config).runner_wrapper.scale_sense
    assert (scale.type, scale.loss_scale_value) == ("FixedLossScaleUpdateCell", 1024)


def test_sections_of_mindformers_in_our_files(config: Path) -> None:
    text = config.read_text(encoding="utf-8").replace("train_dataset:", "train_dataset: &rows")
    text += """
trainer: {type: CausalLanguageModelingTrainer, model_name: glm3_6b}
train_dataset_task: {type: KeyWordGenDataset, dataset_config: *rows}
eval_dataset_task: {type: KeyWordGenDataset, dataset_config: {max_target_length: 9, batch_size: 2}}
moe_config: {expert_num: 1, capacity_factor: 1.05}
callbacks:
  - {type: MFLossMonitor, per_print_times: 7}
  - {type: CheckpointMointor, prefix: x, save_checkpoint_steps: 40, keep_checkpoint_max: 2, integrated_save: False}
  - {type: SummaryMonitor, keep_default_action: True}
eval_callbacks: [{type: ObsMonitor}]
"""
    config.write_text(text, encoding="utf-8")
    settings = load_settings(config)
    assert (settings.checkpoint.save_steps, settings.checkpoint.keep_max, settings.logging.log_steps) == (40, 2, 7)
    assert (settings.eval_dataset.max_target_length, settings.eval_dataset.batch_size) == (9, 8)
    assert settings.runner_wrapper.use_clip_grad is True  # our default, not MindFormers'
    notes = "\n".join(settings.notes)
    for part in (
        "callbacks.CheckpointMointor: save_checkpoint_steps (as save_steps), keep_checkpoint_max (as keep_max) belong",
        "eval_dataset_task.dataset_config.batch_size: 2 is overridden by eval_dataset.batch_size: 8",
        "trainer.type", "trainer.model_name", "eval_callbacks",
    ):  # fmt: skip
        assert part in notes or part.rpartition(".")[2] in notes
    assert load_settings(config, ["checkpoint.save_steps=3"]).checkpoint.save_steps == 3


def test_an_empty_section_of_mindformers_changes_nothing(config: Path) -> None:
    plain = load_settings(config)
    with config.open("a", encoding="utf-8") as file:
        file.write("callbacks: []\ntrainer:\nmoe_config: {}\n")
    assert load_settings(config) == plain
