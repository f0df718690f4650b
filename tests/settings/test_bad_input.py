"""A table of mistakes: each gives a message with the place, the key and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import SettingsError, load_settings

# Text that is appended to the good file (its lines begin at 13) -> parts of the message.
IN_THE_FILE = [
    ("runner_config: {epoch: 2}", ["run.yaml:14: runner_config.epoch: unknown key", "did you mean epochs?"]),
    ("runner_confg: {epochs: 2}", ["runner_confg: unknown key", "did you mean runner_config?"]),
    ("runner_config:\n  epochs: two", ["run.yaml:15: runner_config.epochs", "a whole number", "'two' (str)"]),
    ("runner_config: {epochs: 1000000000000}", ["runner_config.epochs", "at least 1 and at most 1000000"]),
    ("generation: {num_beams: 1000000}", ["generation.num_beams", "at most 1024"]),
    ("runner_config: {epochs: 2.5}", ["a whole number", "2.5 (float)"]),
    ("runner_config: {epochs: 1e3}", ["a whole number", "'1e3'"]),
    ("runner_config: {epochs: '2'}", ["a whole number", "remove the quotes"]),
    ("runner_config: {epochs: True}", ["a whole number", "True (bool)"]),
    ("runner_config: {epochs: 0}", ["found 0", "at least 1"]),
    ("runner_config: {epochs: null}", ["a whole number", "null"]),
    ("runner_config: {epochs: [1]}", ["a whole number", "a list of 1"]),
    ("runner_config: {max_steps: 0}", ["runner_config.max_steps", "at least 1"]),
    ("runner_config: {batch_size: -4}", ["runner_config.batch_size", "found -4"]),
    ("runner_config: False", ["runner_config: expected a section with epochs", "False (bool)"]),
    ("runner_config: 3", ["runner_config: expected a section with epochs", "3 (int)"]),
    ("runner_config: [epochs]", ["expected a section", "a list of 1"]),
    ("runner_wrapper: {use_clip_grad: 1}", ["True or False", "1 (int)"]),
    ("runner_wrapper: {use_clip_grad: 'True'}", ["True or False", "remove the quotes"]),
    ("optimizer: {betas: 0.9}", ["optimizer.betas", "expected a list", "[a, b]"]),
    ("optimizer: {betas: [0.9]}", ["optimizer.betas", "expected 2 values, found 1"]),
    ("optimizer: {betas: [0.9, 1]}", ["optimizer.betas", "found 1.0", "below 1"]),
    ("optimizer: {betas: [0.9, x]}", ["optimizer.betas", "a number", "'x'"]),
    ("optimizer: {type: AdamW}", ["optimizer.type", "'AdamW'", "allowed: GLMAdamW"]),
    ("optimizer: {total_steps: 3}", ["optimizer.total_steps: unknown key", "lr_schedule.total_steps"]),
    ("optimizer: {weight_decay: .nan}", ["optimizer.weight_decay", "finite"]),
    ("optimizer: {eps: small}", ["optimizer.eps", "a number", "'small'"]),
    ("lr_schedule: {learning_rate: -1.e-5}", ["lr_schedule.learning_rate", "at least 0"]),
    ("lr_schedule: {learning_rate: 1e-400}", ["lr_schedule.learning_rate", "too small for a number"]),
    ("lr_schedule: {learning_rate: .inf}", ["lr_schedule.learning_rate", "finite"]),
    ("lr_schedule: {type: cosine}", ["lr_schedule.type", "allowed:", "CosineWithWarmUpLR"]),
    ("lr_schedule: {type: CosineWithWarmupLR}", ["did you mean CosineWithWarmUpLR"]),
    ("lr_schedule: {warmup_ratio: 1.5}", ["warmup_ratio", "at most 1"]),
    ("lr_schedule: {warmup_ratio: 0.1, warmup_steps: 5}", ["warmup_ratio", "together with warmup_steps"]),
    ("lr_schedule: {warmup_steps: 9, total_steps: 5}", ["warmup_steps", "total_steps = 5"]),
    ("lr_schedule: {warmup_steps: 9}\nrunner_config: {max_steps: 5}", ["runner_config.max_steps = 5"]),
    ("lr_schedule: {power: 2}", ["lr_schedule.power", "no effect with LinearWithWarmUpLR"]),
    ("lr_schedule: {lr_end: 1.e-6}", ["lr_schedule.lr_end", "CosineWithWarmUpLR or Polynomial"]),
    ("lr_schedule: {type: CosineWithWarmUpLR, lr_end: 1}", ["lr_schedule.lr_end", "above learning_rate"]),
    ("lr_schedule: {total_steps: 0}", ["lr_schedule.total_steps", "-1"]),
    ("context: {device_target: cpu}", ["context.device_target", "did you mean CPU?"]),
    ("context: {device_target: GPU}", ["context.device_target", "allowed: CPU, Ascend"]),
    ("context: {mode: True}", ["context.mode", "allowed: 0, 1"]),
    ("context: {mode: 2}", ["context.mode", "2 (int)"]),
    ("context: {max_device_memory: 58}", ["max_device_memory", "expected text", "in quotes"]),
    ("context: {max_device_memory: 58G}", ["max_device_memory", "58GB"]),
    ("context: {device_id: -1}", ["context.device_id", "at least 0"]),
    ("metric: {type: Rouge}", ["metric.type", "allowed: ADGENMetric, PerplexityMetric"]),
    ("metric: {type: [ADGENMetric, ADGENMetric]}", ["metric.type", "twice"]),
    ("metric: {type: []}", ["metric.type", "empty"]),
    ("generation: {do_sample: True, top_p: 0}", ["generation.top_p", "above 0 and at most 1"]),
    ("generation: {do_sample: True, temperature: 0}", ["generation.temperature", "above 0"]),
    ("generation: {max_tokens: 9}", ["generation.max_tokens: unknown key"]),
    ("generation: {max_length: 193}", ["generation.max_length: 193 is more than", "seq_length = 192"]),
    ("generation: {num_return_sequences: 2}", ["num_return_sequences", "do_sample or num_beams"]),
    ("generation: {num_beams: 2, num_return_sequences: 3}", ["num_return_sequences", "num_beams = 2"]),
    ("generation: {min_new_tokens: 9, max_new_tokens: 8}", ["min_new_tokens", "9 is more than max_new_tokens = 8"]),
    ("generation: {logit_bias: [7:101]}", ["logit_bias", "numbers must be in [-100, 100]"]),
    ("generation: {logit_bias: [7:1, 07:2]}", ["logit_bias", "an id is given twice"]),
    ("generation: {logit_bias: [7]}", ["logit_bias", "expected text, found 7 (int)"]),
    ("generation: {num_beams: 2, do_sample: True}", ["generation.do_sample", "not supported"]),
    ("seed: abc", ["run.yaml:14: seed", "'abc'"]),
    ("seed: 99999999999", ["seed", "at most 4294967295"]),
    ("run_mode: predict", ["key run_mode is given twice", "run.yaml:1"]),
    ("output_dir: null\nx: 1", ["output_dir is given twice"]),
    ("logging: {log_steps: 1, log_steps: 2}", ["run.yaml:14", "log_steps is given twice"]),
    ("? [a, b]\n: 1", ["a key must be a name, found a sequence"]),
    ("1: 2", ["a key must be a name", "'1'"]),
    ("a: [1, 2", ["run.yaml:15: not valid YAML"]),
    ("a:\n\t- 1", ["run.yaml:15: not valid YAML", "\\t"]),
    ("seed: *nowhere", ["run.yaml:14: not valid YAML", "undefined alias"]),
    ("seed: !!python/object:os.system x", ["run.yaml:14: not valid YAML", "constructor"]),
    ("checkpoint: &c {keep_max: *c}", ["alias contains itself"]),
    ("---\nseed: 1", ["not valid YAML", "single document"]),
    ("checkpoint: {<<: 3}", ["<< must name a mapping"]),
    ("eval_dataset_task: {type: x}", ["eval_dataset_task.type: x: known are KeyWordGenDataset"]),
    ("callback: []", ["callback: unknown key", "known here: seed, run_mode"]),
    ("use_parallel: True\nparallel: {full_batch: True}", ["parallel.full_batch", "parallel_mode: 1"]),
    ("use_parallel: True\nparallel_config: {model_parallel: 2}", ["model_parallel", "parallel_mode: 1"]),
    (
        "use_parallel: True\nparallel: {parallel_mode: 1, full_batch: True}\nparallel_config: {pipeline_stage: 2}",
        ["parallel_config.micro_batch_num", "pipeline_stage = 2"],
    ),
    (
        "use_parallel: True\nparallel_config: {use_seq_parallel: True}",
        ["use_seq_parallel", "parallel_mode: 1"],
    ),
    ("load_checkpoint: gone.ckpt", ["run.yaml:14: load_checkpoint: gone.ckpt", "no such file"]),
    ("resume_training: gone", ["resume_training: gone", "no such file"]),
    ('load_adapter: "a\\0b"', ["load_adapter: 'a\\x00b': a path cannot contain a NUL character"]),
    ("seed: 010", ["run.yaml:14: seed", "a whole number, found '010'"]),
    ("seed: 1:30", ["seed", "a whole number, found '1:30'"]),
    ("seed: 2026-01-31", ["seed", "a whole number"]),
    ("seed: !!bool maybe", ["run.yaml:14: not valid YAML: no constructor of the tag !!bool for 'maybe'"]),
    ("seed: !!int ''", ["run.yaml:14: not valid YAML: no constructor of the tag !!int for ''"]),
    ("optimizer: !!str {eps: 1}", ["not valid YAML: no constructor of the tag !!str for a mapping"]),
    ("optimizer: {betas: !!set [1, 2]}", ["no constructor of the tag !!set for a sequence"]),
    ("model: {init: !!null random}", ["model is given twice"]),
    ("runner_config: {epochs: !!float 2}", ["a whole number", "2.0 (float)"]),
    ("resume_training: 3", ["resume_training", "True or False or text", "3 (int)"]),
]

# An override -> parts of the message.
ON_THE_COMMAND_LINE = [
    ("runner_config.epoch=2", ["command line (runner_config.epoch=2)", "did you mean epochs?"]),
    ("runner_config.epochs=two", ["command line (runner_config.epochs=two)", "a whole number"]),
    ("epochs=2", ["epochs: unknown key", "the key is runner_config.epochs"]),
    ("seed.x=1", ["command line (seed.x=1): seed", "a whole number, found a mapping"]),
    ("run_mode.x=1", ["run_mode is not a section"]),
    ("seed=", ["seed", "a whole number, found null"]),
    ("optimizer=3", ["optimizer: expected a section"]),
    ("optimizer.betas=[0.9", ["optimizer.betas", "expected a list"]),
    ("optimizer={bets: [0.9, 0.9]}", ["optimizer.bets: unknown key", "did you mean betas?"]),
    ("generation.do_sample=maybe", ["generation.do_sample", "True or False", "'maybe'"]),
    ("=3", ["expected key.sub=value"]),
    ("seed", ["'seed': expected key.sub=value"]),
    ("run_mode=evaluate", ["run_mode", "allowed: train, finetune, eval, predict", "did you mean eval?"]),
    ("run_mode=predict", ["predict_data: missing", "--predict_data"]),
    ("model.model_config.num_attention_heads=3", ["num_attention_heads", "not a multiple of"]),
    ("model.model_config.compute_dtype=fp16", ["model.model_config.compute_dtype", "float16"]),
    ("model.model_config.hidden_dropout=1", ["model.model_config.hidden_dropout", "[0, 1)"]),
    ("model.model_config.rope_ratio=0", ["model.model_config", "rope_ratio"]),
    ("model.model_config.type=ChatGLM2Config", ["model.model_config.type", "allowed: GLMConfig"]),
    ("model.model_config.padded_vocab_size=big", ["padded_vocab_size", "a whole number or 'auto'"]),
    ("model.model_config.padded_vocab_size=0", ["padded_vocab_size", "at least 1"]),
    ("model.model_config.hiden_size=64", ["did you mean hidden_size or"]),
    ("model.model_config.seq_length=200", ["64 + 127 + 1 = 192", "max_target_length to 135"]),
    ("train_dataset.epochs=3", ["train_dataset.epochs: unknown key", "runner_config.epochs"]),
    ("seed=010", ["seed", "a whole number, found '010'"]),
    ("seed=!!int 5 6", ["seed", "a whole number"]),
    ("optimizer.eps=1:30.5", ["optimizer.eps", "a number, found '1:30.5'"]),
    ("optimizer.eps=.inf", ["optimizer.eps", "a finite number"]),
    ("output_dir=", ["output_dir: empty; give a folder"]),
    ("resume_training=", ["resume_training: empty; give True, False or a checkpoint"]),
    (f"output_dir=a/{'x' * 256}", ["output_dir: ", "too long for a path (258 bytes)"]),
    (f"load_checkpoint={'x/' * 2048}", ["load_checkpoint: ", "too long for a path"]),
    ("train_dataset.data_loader.dataset_dir=a\udcff", ["dataset_dir: ", "a path must be UTF-8"]),
    ("processor.tokenizer.vocab_file=*.model", ["a pattern is not expanded here: give the files (tokenizer.model)"]),
    ("train_dataset.data_loader.dataset_dir=data/*.json", ["(data/dev.json, data/train.json)"]),
    ("train_dataset.data_loader.dataset_dir=", ["dataset_dir: missing", "--train_dataset"]),
    ("train_dataset.data_loader.origin_columns=[a, b, c, d]", ["expected 2 or 3 values, found 4"]),
    ("train_dataset.data_loader.origin_columns=[a, a]", ["origin_columns: column 'a' is named twice"]),
    ("train_dataset.data_loader.system_column=content", ["column 'content' is named twice"]),
    ("train_dataset.data_loader.histroy_column=h", ["unknown key; did you mean history_column"]),
    ("processor.tokenizer.template=none", ["found 'none'", "allowed: chat, plain"]),
    ("template=plain", ["the key is processor.tokenizer.template"]),
    ("eval_dataset.data_loader.shuffle=True", ["eval_dataset.data_loader.shuffle", "allowed: False"]),
    ("processor.tokenizer.vocab_file=gone.model", ["gone.model: no such file", "tools/train_vocab.py"]),
    ("processor.tokenizer.vocab_file=.", [". is a folder; give the file tokenizer.model"]),
    ("processor.tokenizer.vocab_file=", ["vocab_file: missing"]),
    ("processor.tokenizer.type=ChatGLMTokenizer", ["did you mean ChatGLM3Tokenizer or ChatGLM2Tokenizer"]),
]


@pytest.mark.parametrize(("text", "parts"), IN_THE_FILE, ids=[text for text, _ in IN_THE_FILE])
def test_mistake_in_the_file(text: str, parts: list[str], config: Path) -> None:
    config.write_text(f"{config.read_text(encoding='utf-8')}{text}\n", encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(config)
    assert len(caught.value.problems) == 1, str(caught.value)
    for part in ["run.yaml", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(("text", "parts"), ON_THE_COMMAND_LINE, ids=[text for text, _ in ON_THE_COMMAND_LINE])
def test_mistake_on_the_command_line(text: str, parts: list[str], config: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, [text])
    assert len(caught.value.problems) == 1, str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["has no settings"]),
        (b"# nothing but a comment\n", ["has no settings"]),
        (b"- a\n- b\n", ["bad.yaml:1", "key: value"]),
        (b"just text\n", ["key: value"]),
        (b"\xff\xfe\x00\x01", ["not UTF-8"]),
        (b"seed: \x00\n", ["has NUL bytes"]),
        (b"a: " + b"[" * 100_000, ["bad.yaml:1: not valid YAML: nested more than 100 levels deep"]),
        ("\n".join(" " * i + "a:" for i in range(200)).encode(), ["bad.yaml:101: not valid YAML: nested more"]),
        (b"seed: " + b"1" * 5000, ["bad.yaml"]),
        (b"seed: 2024-13-45\n", ["bad.yaml"]),
    ],
)
def test_files_that_are_no_settings(content: bytes, parts: list[str], config: Path) -> None:
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings("bad.yaml")
    for part in ["bad.yaml", *parts]:
        assert part in str(caught.value)


def test_missing_file_and_folder(config: Path) -> None:
    with pytest.raises(SettingsError, match=r"rum\.yaml: no such file; did you mean run\.yaml"):
        load_settings("rum.yaml")
    with pytest.raises(SettingsError, match="is a folder"):
        load_settings("data")
    with pytest.raises(SettingsError, match="no such file"):
        load_settings("nowhere/at/all.yaml")


def test_flag_and_override_for_one_key(config: Path) -> None:
    with pytest.raises(SettingsError, match="given twice, by --epochs and by"):
        load_settings(config, ["runner_config.epochs=2"], {"epochs": "3"})
    with pytest.raises(SettingsError, match="given twice, by --batch_size"):
        load_settings(config, ["runner_config.batch_size=2"], {"batch_size": "3"})
    with pytest.raises(SettingsError, match="--epoch: unknown flag; did you mean epochs"):
        load_settings(config, flags={"epoch": "3"})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["generation.max_new_tokens=129"], ["max_new_tokens = 193", "ADGENMetric", "seq_length to 193"]),
        (
            ["metric.type=PerplexityMetric", "eval_dataset.max_target_length=128"],
            ["= 193", "PerplexityMetric", "eval_dataset.max_target_length"],
        ),
    ],
)
def test_evaluation_must_fit_the_sequence_length(overrides: list[str], parts: list[str], config: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides, {"run_mode": "eval"})
    for part in parts:
        assert part in str(caught.value)
    load_settings(config, flags={"run_mode": "eval"})


def test_prompt_file_that_is_missing(config: Path) -> None:
    for name in ("prompts.txt", "prompts.jsonl"):
        with pytest.raises(SettingsError, match=rf"predict_data: {name}: no such file"):
            load_settings(config, flags={"run_mode": "predict", "predict_data": name})
    assert load_settings(config, flags={"run_mode": "predict", "predict_data": "-"}).predict_data == "-"
