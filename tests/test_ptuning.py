"""`glm_ms.ptuning`: training, answers and loading by the calls of the package guides."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from engine_fixtures import vocabulary  # noqa: F401, sets the log folder of MindFormers
from engine_helpers import CONFIGS, read_jsonl

from glm_ms import GLMForCausalLM
from glm_ms.families import read_config
from glm_ms.ptuning import Arguments, _prediction, _training, load_ptuning_checkpoint, ptuning
from glm_ms.settings import load_settings

SAMPLE = CONFIGS / "tiny" / "sample"
COLUMNS = {"prompt_column": "content", "response_column": "summary"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A Hugging Face folder of ChatGLM2 with a vocabulary of its 512 ids."""
    folder = tmp_path_factory.mktemp("base") / "glm2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / "models" / "glm2_tiny" / name, folder)
    lines = (SAMPLE / "titles_train.json").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=480, byte_fallback=True,
        character_coverage=0.98, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        normalization_rule_name="identity",
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"model_generation": 2}')
    return folder


def settings_of(values: dict[str, Any], folder: Path) -> Any:
    path = folder / "settings.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return load_settings(path)


def test_the_settings_of_the_guide(base: Path, tmp_path: Path) -> None:
    given = Arguments(
        model_name_or_path=str(base), output_dir=str(tmp_path / "run"), do_train=True, **COLUMNS,
        train_file=str(SAMPLE / "titles_train.json"), validation_file=str(SAMPLE / "titles_dev.json"),
        max_source_length=64, max_target_length=32, per_device_train_batch_size=1, gradient_accumulation_steps=16,
        max_steps=3000, logging_steps=10, save_steps=100, learning_rate=2e-2, pre_seq_len=16, max_train_samples=7,
    )  # fmt: skip
    settings = settings_of(_training(given), tmp_path)
    assert settings.run_mode == "finetune"
    network = {name: getattr(settings.model.model_config, name) for name in dataclasses.asdict(read_config(base))}
    assert network == {**dataclasses.asdict(read_config(base)), "seq_length": 97}
    assert dataclasses.asdict(settings.model.pet_config) | {"pet_type": "ptuning2", "pre_seq_len": 16} == (
        dataclasses.asdict(settings.model.pet_config)
    )
    assert settings.processor.tokenizer.type == "ChatGLM2Tokenizer"
    assert settings.processor.tokenizer.vocab_file == str(base / "tokenizer.model")
    runner = settings.runner_config
    assert (runner.max_steps, runner.batch_size, runner.gradient_accumulation_steps) == (3000, 1, 16)
    assert (settings.lr_schedule.learning_rate, settings.checkpoint.save_steps, settings.seed) == (0.02, 100, 42)
    assert (settings.logging.log_steps, settings.train_dataset.num_samples) == (10, 7)
    assert settings.do_eval
    (tmp_path / "run" / "checkpoint" / "step_00000100").mkdir(parents=True)
    given = dataclasses.replace(given, ptuning_checkpoint=str(tmp_path / "run" / "checkpoint-100"))
    settings = settings_of(_prediction(given), tmp_path)
    assert (settings.run_mode, settings.load_adapter) == ("eval", str(tmp_path / "run/checkpoint/step_00000100"))
    assert (settings.generation.max_length, settings.generation.top_p, settings.generation.do_sample) == (97, 0.7, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to do"),
        ({"do_train": True}, "train_file: missing"),
        ({"do_predict": True}, "test_file: missing"),
        ({"do_train": True, "quantization_bit": 3}, "3 bits: must be 8 or 4"),
        ({"do_predict": True, "test_file": "nowhere.json"}, "nowhere.json: no such file"),
    ],
)
def test_what_cannot_be_used(base: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptuning(model_name_or_path=str(base), output_dir=str(tmp_path / "run"), **COLUMNS, **arguments)
    with pytest.raises(TypeError, match="train_fil"):
        ptuning(model_name_or_path=str(base), output_dir=str(tmp_path), **COLUMNS, train_fil="x")


def test_a_run_is_not_replaced_by_chance(base: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / "step_00000100").mkdir(parents=True)
    given = {"model_name_or_path": str(base), "output_dir": str(tmp_path), "train_file": "x.json", **COLUMNS}
    with pytest.raises(ValueError, match="has checkpoints; set overwrite_output_dir=True"):
        ptuning(do_train=True, **given)


@pytest.mark.slow
def test_train_predict_and_load(base: Path, tmp_path: Path) -> None:
    shared = {
        "model_name_or_path": str(base), "output_dir": str(tmp_path / "run"), **COLUMNS, "pre_seq_len": 4,
        "max_source_length": 48, "max_target_length": 15, "overwrite_cache": True,
    }  # fmt: skip
    scores = ptuning(
        do_train=True, train_file=str(SAMPLE / "titles_train.json"), max_train_samples=16, max_steps=2, save_steps=1,
        validation_file=str(SAMPLE / "titles_dev.json"), max_eval_samples=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=0.02, logging_steps=1, overwrite_output_dir=True, **shared,
    )  # fmt: skip
    assert scores == {}
    run = tmp_path / "run"
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    scores = ptuning(
        do_predict=True, test_file=str(SAMPLE / "titles_dev.json"), max_predict_samples=3,
        ptuning_checkpoint=str(run / "checkpoint-2"), **shared,
    )  # fmt: skip
    assert {"rouge-1", "rouge-2", "rouge-l", "bleu-4"} <= set(scores)
    generated = [json.loads(line) for line in (run / "generated_predictions.txt").read_text().split("\n")]
    records = read_jsonl(SAMPLE / "titles_dev.json")[:3]
    for line, record in zip(generated, records):  # references are cut to max_target_length
        assert line["labels"]
        assert record["summary"].startswith(line["labels"].rstrip("\ufffd"))
    assert all(set(line) == {"labels", "predict"} for line in generated)

    tokenizer, config, model = load_ptuning_checkpoint(base, run / "checkpoint-1", pre_seq_len=4)
    assert isinstance(model, GLMForCausalLM)
    assert config.hidden_size == 64
    ids = tokenizer.build_chat_input("你好")["input_ids"]
    other = load_ptuning_checkpoint(base)[2]
    assert np.abs(model(ids).asnumpy() - other(ids).asnumpy()).max() > 1e-4
    with pytest.raises(ValueError, match=r"pre_seq_len = 128: the prefix in .* has 4"):
        load_ptuning_checkpoint(base, run / "checkpoint-1", pre_seq_len=128)
