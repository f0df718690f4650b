"""The whole path on real ADGEN records with the genuine vocabulary. Minutes each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_helpers import CONFIGS, curve, read_jsonl, run_apart

from glm_ms import ChatGLM2Tokenizer, ChatGLM3Tokenizer

pytestmark = pytest.mark.slow
# Ids of a row of the overfitted network.
MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 56, 71
NUM_OVERFITTED, NUM_TRAINED, NUM_HELD_OUT = 32, 970, 100


@pytest.fixture(scope="module")
def lines(adgen_file: Path) -> list[str]:
    """The records of the real development set, a line each."""
    found = adgen_file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(found) == NUM_TRAINED + NUM_HELD_OUT
    return found


@pytest.fixture(scope="module")
def short_records(lines: list[str], vocab_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first records that fit whole into a row of either model: short rows make it minutes."""
    tokenizers, chosen = [ChatGLM2Tokenizer(vocab_file), ChatGLM3Tokenizer(vocab_file)], []
    for line in lines:
        record = json.loads(line)
        prompts = [len(one.build_chat_input(record["content"])["input_ids"]) for one in tokenizers]
        answer = len(tokenizers[0].encode(record["summary"], add_special_tokens=False))
        # ChatGLM3 puts role and line break around an answer, and evaluates prompts below the limit only.
        if max(prompts) < MAX_SOURCE_LENGTH and answer + 4 < MAX_TARGET_LENGTH:
            chosen.append(line)
    path = tmp_path_factory.mktemp("records") / "short.json"
    path.write_text("".join(chosen[:NUM_OVERFITTED]), encoding="utf-8")
    return path


@pytest.mark.parametrize(("generation", "epochs"), [(3, 40), (2, 60)])
def test_overfitting(short_records: Path, vocab_file: Path, tmp_path: Path, generation: int, epochs: int) -> None:
    """A small network learns 32 records by heart, and generation repeats them."""
    lengths = [f"model.model_config.seq_length={MAX_SOURCE_LENGTH + MAX_TARGET_LENGTH + 1}"]
    for part in ("train", "eval"):
        lengths.append(f"{part}_dataset.max_source_length={MAX_SOURCE_LENGTH}")
        lengths.append(f"{part}_dataset.max_target_length={MAX_TARGET_LENGTH}")
        lengths.append(f"{part}_dataset.data_loader.dataset_dir={short_records}")
    shared = [
        "--config", str(CONFIGS / "tiny" / f"finetune_glm{generation}_tiny.yaml"), *lengths,
        f"processor.tokenizer.vocab_file={vocab_file}", f"generation.max_new_tokens={MAX_TARGET_LENGTH + 1}",
    ]  # fmt: skip
    done = run_apart(
        [*shared, "--output_dir", "run", "--epochs", str(epochs), "--batch_size", "2",
         "lr_schedule.learning_rate=0.005", "optimizer.betas=[0.9, 0.95]", "optimizer.weight_decay=0.0",
         "checkpoint.save_steps=null"],
        tmp_path, timeout=1800
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in curve(tmp_path / "run")]
    assert losses[0] > 10  # a network that knows nothing: about the logarithm of the size of the vocabulary
    assert max(losses[-16:]) < 0.1
    done = run_apart(
        [*shared, "--run_mode", "eval", "--load_checkpoint", "run", "--output_dir", "eval", "--batch_size", "8",
         "metric.type=ADGENMetric"],
        tmp_path, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "eval" / "eval_scores.json").read_text())
    assert scores["num_samples"] == NUM_OVERFITTED
    assert scores["num_empty"] == 0
    assert scores["rouge-l"] >= 95
    assert scores["bleu-4"] >= 90
    assert len(read_jsonl(tmp_path / "eval" / "eval_predictions.jsonl")) == NUM_OVERFITTED


def test_perplexity_on_held_out_records(lines: list[str], vocab_file: Path, tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.json", tmp_path / "held_out.json"
    train.write_text("".join(lines[:NUM_TRAINED]), encoding="utf-8")
    held_out.write_text("".join(lines[NUM_TRAINED:]), encoding="utf-8")
    config = ["--config", str(CONFIGS / "tiny" / "finetune_glm3_tiny.yaml"),
              f"processor.tokenizer.vocab_file={vocab_file}"]  # fmt: skip

    def perplexity(name: str, *weights: str) -> float:
        done = run_apart(
            [*config, "--run_mode", "eval", "--eval_dataset", str(held_out), "--output_dir", name,
             "metric.type=PerplexityMetric", *weights],
            tmp_path, timeout=600
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / name / "eval_scores.json").read_text())
        assert f"{NUM_HELD_OUT} records used" in done.stderr
        return scores["perplexity"]

    untrained = perplexity("before", "model.init=random")
    done = run_apart(
        [*config, "--run_mode", "finetune", "--train_dataset", str(train),
         "--output_dir", "run", "--batch_size", "4", "runner_config.max_steps=60"],
        tmp_path, timeout=1500
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = perplexity("after", "--load_checkpoint", "run")
    assert 30000 < untrained < 200000  # about the size of the vocabulary
    assert trained < untrained / 10
