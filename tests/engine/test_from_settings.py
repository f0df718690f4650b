"""Data sets of the settings: which records, which lengths, the cache; and runs on conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import CONFIGS, SMALL_TRAINING, run_here, tiny_arguments
from safetensors.numpy import save_file

from glm_ms import ChatGLM3Tokenizer
from glm_ms.engine.from_settings import labelled_rows, prompts_with_references
from glm_ms.engine.weights import build_unfilled_model
from glm_ms.settings import load_settings
from glm_ms.settings.schema import GenerationSettings
from glm_ms.storage.errors import CheckpointError, DataError

SAMPLE = CONFIGS / "tiny" / "sample"
TOOLS = "data_loader.type=ToolAlpacaDataLoader"
CHAT = "data_loader.type=ConversationDataLoader"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> dict[str, Path]:
    """The conversations of the sample without what only ToolAlpacaDataLoader knows."""
    folder, paths = tmp_path_factory.mktemp("chats"), {}
    for part in ("train", "dev"):
        paths[part] = folder / f"{part}.json"
        lines = (SAMPLE / f"conversations_{part}.json").read_text(encoding="utf-8").splitlines()
        with paths[part].open("w", encoding="utf-8") as file:
            for record in map(json.loads, lines):
                messages = [
                    {key: message[key] for key in ("role", "content")}
                    for message in record["conversations"]
                    if message["role"] != "tool"
                ]
                file.write(json.dumps({"conversations": messages}) + "\n")
    return paths


def settings_of(vocabulary, *overrides, config="finetune_glm3_tiny"):
    vocab_file = f"processor.tokenizer.vocab_file={vocabulary}"
    return load_settings(CONFIGS / "tiny" / f"{config}.yaml", [vocab_file, *overrides], check_files=False)


def test_weights_are_named_after_they_were_checked(vocabulary, tmp_path):
    file, said = tmp_path / "model.safetensors", []
    save_file({"transformer.embedding.embedding_table": np.zeros((832, 8), np.float32)}, file)
    settings = settings_of(vocabulary, f"load_checkpoint={file}", "model.model_config.padded_vocab_size=832")
    with pytest.raises(CheckpointError, match="embedding_table"):
        build_unfilled_model(settings, 832, said.append)
    assert said == []


def test_tools(vocabulary):
    settings = settings_of(
        vocabulary,
        "model.model_config.seq_length=400",
        *(f"{part}_dataset.max_seq_length=null" for part in ("train", "eval")),
        config="multiturn_glm3_tiny",
    )
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    settings.train_dataset.data_loader.dataset_dir = str(SAMPLE / "conversations_train.json")
    settings.eval_dataset.data_loader.dataset_dir = str(SAMPLE / "conversations_dev.json")
    rows = labelled_rows(settings.train_dataset, tokenizer)
    assert rows.seq_length == 400
    assert rows[0]["attention_mask"].all()
    assert labelled_rows(settings.eval_dataset, tokenizer).seq_length == 400
    few = prompts_with_references(settings.eval_dataset, tokenizer, GenerationSettings(max_new_tokens=250))
    many = prompts_with_references(settings.eval_dataset, tokenizer, GenerationSettings(max_new_tokens=10))
    assert few.too_long > many.too_long
    assert max(len(item["input_ids"]) for item in few) <= 150
    bounded = GenerationSettings(max_new_tokens=250, max_length=120)
    assert (
        max(len(item["input_ids"]) for item in prompts_with_references(settings.eval_dataset, tokenizer, bounded)) < 120
    )
    settings.eval_dataset.max_seq_length = None
    for build in (labelled_rows, lambda *them: prompts_with_references(*them, bounded)):
        with pytest.raises(DataError, match="max_seq_length: missing"):
            build(settings.eval_dataset, tokenizer)


def test_chats(vocabulary, chats):
    settings = settings_of(vocabulary, f"train_dataset.{CHAT}", f"eval_dataset.{CHAT}")
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    settings.train_dataset.data_loader.dataset_dir = str(chats["train"])
    settings.eval_dataset.data_loader.dataset_dir = str(chats["dev"])
    rows = labelled_rows(settings.train_dataset, tokenizer)
    assert rows.seq_length == 128
    assert not rows[0]["attention_mask"].all()  # padded on the left
    answers = prompts_with_references(settings.eval_dataset, tokenizer, settings.generation)
    assert len(answers) > 16
    assert max(len(item["input_ids"]) for item in answers) <= settings.eval_dataset.max_source_length


def test_cache(vocabulary, tmp_path):
    settings = settings_of(vocabulary, f"train_dataset.cache_dir={tmp_path / 'cache'}")
    settings.train_dataset.data_loader.dataset_dir = str(SAMPLE / "train.json")
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    rows = labelled_rows(settings.train_dataset, tokenizer)
    assert str(tmp_path / "cache") in rows.describe()
    settings.train_dataset.cache_dir = None
    plain = labelled_rows(settings.train_dataset, tokenizer)
    assert len(rows) == len(plain) == 1200
    assert all((rows[i][name] == plain[i][name]).all() for i in (0, 600, 1199) for name in plain[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tools", "chats"])
def test_runs_on_conversations(kind, vocabulary, chats, tmp_path):
    """Training, evaluation while training and afterwards with both metrics; the cache changes no loss."""
    metrics = [
        "metric.type=[ADGENMetric,PerplexityMetric]",
        "generation.max_new_tokens=8",
        "eval_dataset.num_samples=4",
    ]
    if kind == "tools":
        data = {part: SAMPLE / f"conversations_{part}.json" for part in ("train", "dev")}
        loaders = [
            f"train_dataset.{TOOLS}", f"eval_dataset.{TOOLS}", "train_dataset.max_source_length=64",
            "train_dataset.max_target_length=127", "model.model_config.seq_length=400",
        ]  # fmt: skip
    else:
        data, loaders = chats, [f"train_dataset.{CHAT}", f"eval_dataset.{CHAT}"]
    records = [
        f"{part}_dataset.data_loader.dataset_dir={data[name]}" for part, name in (("train", "train"), ("eval", "dev"))
    ]
    losses = []
    for folder, cache in (("plain", "null"), ("cached", tmp_path / "cache")):
        line = tiny_arguments(
            "finetune", vocabulary, *SMALL_TRAINING, "--output_dir", tmp_path / folder, *loaders, *metrics,
            *records, "do_eval=True",
            "eval_step_interval=2", "runner_config.max_steps=2", f"train_dataset.cache_dir={cache}"
        )  # fmt: skip
        assert run_here(line) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "learning_rate" in record])
        predictions = (tmp_path / folder / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(predictions) > 4
        assert all(json.loads(line)["prompt"].startswith("[gMASK]sop<|") for line in predictions)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    again = tiny_arguments(
        "eval", vocabulary, *SMALL_TRAINING, "--output_dir", tmp_path / "eval", "--load_checkpoint",
        tmp_path / "plain", *metrics, *loaders, *records
    )  # fmt: skip
    assert run_here(again) == 0
    scores = json.loads((tmp_path / "eval" / "eval_scores.json").read_text(encoding="utf-8"))
    assert {"rouge-l", "bleu-4", "perplexity"} <= set(scores)
