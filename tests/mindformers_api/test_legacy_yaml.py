"""Configurations of MindFormers 1.0 to 1.3 through run_glm.py: trained, evaluated, asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_helpers import CONFIGS, DEV_RECORDS, SMALL_NETWORK, TRAIN_RECORDS, curve, read_jsonl, run_here
from legacy_yaml import LORA, PTUNING, legacy_yaml

SIZE = (
    *SMALL_NETWORK,
    "model.model_config.num_attention_heads=4",
    "model.model_config.padded_vocab_size=auto",
)
TWO_STEPS = ("train_dataset.num_samples=8", "runner_config.batch_size=4", "logging.tensorboard=False")


@pytest.fixture
def run(vocabulary: Path, tmp_path: Path):
    """run(text, job, *arguments): runs a configuration on the CPU; returns its output folder, named by the job."""

    def run_file(text: str, job: str, *arguments: object, records: Path = TRAIN_RECORDS) -> Path:
        path, output = tmp_path / f"{job}.yaml", tmp_path / job
        path.write_text(text, encoding="utf-8")
        line = [
            "--config", path, "--device_target", "CPU", "--output_dir", output, "--train_dataset_dir", records,
            "--eval_dataset_dir", DEV_RECORDS, f"processor.tokenizer.vocab_file={vocabulary}", *SIZE, *arguments,
        ]  # fmt: skip
        assert run_here([str(argument) for argument in line]) == 0
        return output

    return run_file


def test_trained_evaluated_and_asked(run, capsys: pytest.CaptureFixture) -> None:
    trained = run(legacy_yaml(), "train", "model.init=random", *TWO_STEPS)
    said = capsys.readouterr().err
    assert "train.yaml:25: model.model_config.type: ChatGLM2Config is GLMConfig here" in said
    assert "no effect here: " in said
    assert [line["step"] for line in read_jsonl(trained / "metrics.jsonl")] == [1, 2]
    # The same run in our names.
    again = run((trained / "settings.yaml").read_text(encoding="utf-8"), "again")
    assert curve(again) == curve(trained)

    weights = ("--load_checkpoint", trained)
    scores = run(
        legacy_yaml(("run_mode: 'train'", "run_mode: 'eval'"), ("PerplexityMetric", "ADGENMetric")),
        "eval", *weights, "eval_dataset.num_samples=2", "model.model_config.max_decode_length=80"
    )  # fmt: skip
    assert json.loads((scores / "eval_scores.json").read_text())["num_samples"] == 2

    answers = run(
        legacy_yaml(("run_mode: 'train'", "run_mode: 'predict'"), ("max_decode_length: 256", "max_decode_length: 30")),
        "predict", *weights, "--predict_data", "类型#裙"
    )  # fmt: skip
    (result,) = read_jsonl(answers / "predict_results.jsonl")
    assert result["prompt"] == "类型#裙"


@pytest.mark.slow
def test_lora(run, tmp_path: Path) -> None:
    base = run(legacy_yaml(), "base", "model.init=random", *TWO_STEPS, "runner_config.max_steps=1")
    output = run(legacy_yaml(pet=LORA), "lora", "--load_checkpoint", base, *TWO_STEPS)
    config = json.loads((output / "checkpoint" / "step_00000002" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32)
    text = legacy_yaml(("run_mode: 'train'", "run_mode: 'eval'"), pet=LORA)
    scores = run(text, "eval", "--load_checkpoint", base, "--load_adapter", output, "eval_dataset.num_samples=2")
    assert json.loads((scores / "eval_scores.json").read_text())["perplexity"] > 1


@pytest.mark.slow
def test_ptuning2(run) -> None:
    base = run(legacy_yaml(), "base", "model.init=random", *TWO_STEPS, "runner_config.max_steps=1")
    text = legacy_yaml(("pre_seq_len: 128", "pre_seq_len: 4"), pet=PTUNING)
    output = run(text, "ptuning2", "--load_checkpoint", base, *TWO_STEPS)
    assert (output / "checkpoint" / "step_00000002" / "prefix_encoder.safetensors").is_file()


@pytest.mark.slow
def test_conversations_with_tools(run) -> None:
    records = CONFIGS / "tiny" / "sample" / "conversations_train.json"
    text = legacy_yaml(generation=3, tools=True)
    output = run(text, "tools", "model.init=random", *TWO_STEPS, records=records)
    assert len(read_jsonl(output / "metrics.jsonl")) == 2


@pytest.mark.slow
def test_codegeex2_and_the_32k_models(run) -> None:
    codegeex = legacy_yaml(
        ("    hidden_size: 4096\n", "    hidden_size: 4096\n    interleaved_qkv: False\n    rotary_percent: 0.5\n"),
        ("    pad_token_id: 0\n", ""), ("loss_scale_value: 65536", "loss_scale_value: 4294967296"),
        ("  expert_parallel: 1\n", "  expert_parallel: 1\n  optimizer_shard: True\n"),
        ("type: polynomial", "type: linear"), ("  lr_end: 1.e-6\n", ""),
    )  # fmt: skip
    run(codegeex, "codegeex2", "model.init=random", *TWO_STEPS)
    longer = legacy_yaml(
        ("type: ChatGLM2Config", "type: ChatGLM32kConfig"), ("rope_ratio: 1\n", "rope_ratio: 50\n"),
        ("ChatGLM2ForConditionalGeneration", "ChatGLM32kForConditionalGeneration"),
        ("ChatGLM3Tokenizer", "ChatGLM32kTokenizer"), generation=3
    )  # fmt: skip
    trained = run(longer, "32k", "model.init=random", *TWO_STEPS)
    template = "    bos_token: '<sop>'\n    chat_template: '[gMASK]sop{% for message in messages %}{% endfor %}'\n"
    asked = longer.replace("    bos_token: '<sop>'\n", template).replace("run_mode: 'train'", "run_mode: 'predcit'")
    length = ("model.model_config.max_decode_length=30", "--predict_data", "类型#裙", "--run_mode", "predict")
    answers = run(asked, "answers", "--load_checkpoint", trained, *length)
    assert len(read_jsonl(answers / "predict_results.jsonl")) == 1
