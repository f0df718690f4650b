"""--run_mode eval: scores and perplexity against independent computations, whatever the batch size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
from data_helpers import adgen_rows
from engine_helpers import DEV_RECORDS, TRAINED_NETWORK, read_jsonl, run_here, tiny_arguments
from marks import slow_unless
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from tolerances import LOSS, METRIC

from glm_ms import ChatGLM3Tokenizer, GLMForCausalLM, load_pretrained
from glm_ms.settings import settings_from_command_line

NUM_RECORDS = 11  # no multiple of any batch size below
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


@pytest.fixture(scope="module")
def model(trained: Path) -> GLMForCausalLM:
    return load_pretrained(trained)


@pytest.fixture
def evaluate(vocabulary: Path, trained: Path, model: GLMForCausalLM, tmp_path: Path):
    """Evaluates with one model for all tests; returns scores, predictions and what was said."""
    from glm_ms.engine.evaluate import evaluate as evaluate_all

    def run(name: str, *arguments: object, model: GLMForCausalLM = model) -> tuple[dict, list | None, str]:
        folder = tmp_path / name
        folder.mkdir()
        settings = settings_from_command_line(
            tiny_arguments(
                "eval", vocabulary, *TRAINED_NETWORK, f"eval_dataset.num_samples={NUM_RECORDS}",
                "--output_dir", folder, "--load_checkpoint", trained, *arguments
            )
        )  # fmt: skip
        said: list[str] = []
        scores = evaluate_all(settings, model, ChatGLM3Tokenizer(vocabulary), said.append)
        assert json.loads((folder / "eval_scores.json").read_text()) == scores
        predictions = folder / "eval_predictions.jsonl"
        return scores, read_jsonl(predictions) if predictions.exists() else None, "\n".join(said)

    return run


def independent_scores(prediction: str, reference: str) -> dict[str, float]:
    """As `ptuning/main.py` of ChatGLM2-6B computes them, but 0 for an empty prediction."""
    if not prediction:
        return dict.fromkeys(SCORES, 0.0)
    words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
    rouge = Rouge().get_scores(*words)[0]
    scores = {name: 100 * rouge[name]["f"] for name in SCORES[:3]}
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return {**scores, "bleu-4": 100 * bleu}


def sample_references() -> list[str]:
    return [record["summary"] for record in read_jsonl(DEV_RECORDS)[:NUM_RECORDS]]


def check_scores(scores: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    each = [independent_scores(line["prediction"], line["reference"]) for line in predictions]
    for name in SCORES:
        mean = float(np.mean([item[name] for item in each]))
        assert scores[name] == pytest.approx(mean, abs=METRIC["atol"], rel=METRIC["rtol"])
    assert scores["num_samples"] == len(predictions)
    assert scores["num_empty"] == sum(not line["prediction"] for line in predictions)


@pytest.mark.parametrize("generation", slow_unless([3], [2, 3]))
def test_whole_run(
    vocabulary: Path, finetune, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    generation: int
) -> None:  # fmt: skip
    sizes = TRAINED_NETWORK
    load = trained if generation == 3 else finetune(tmp_path / "run", *sizes, generation=generation)
    line = tiny_arguments(
        "eval", vocabulary, *sizes, f"eval_dataset.num_samples={NUM_RECORDS}", "--output_dir", tmp_path,
        "--load_checkpoint", load, generation=generation
    )  # fmt: skip
    assert run_here(line) == 0
    shown = capsys.readouterr()
    predictions = read_jsonl(tmp_path / "eval_predictions.jsonl")
    scores = json.loads((tmp_path / "eval_scores.json").read_text())
    assert [line["reference"] for line in predictions] == sample_references()
    check_scores(scores, predictions)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]), rel=1e-12)
    if generation == 3:  # that network has learned something, and not everything
        assert 5 < scores["bleu-4"] < 99
    for name, value in scores.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        assert f"{name}: {text}" in shown.out.splitlines()
    assert f"{NUM_RECORDS} records used" in shown.err


@pytest.mark.parametrize(
    "decoding",
    [
        (),
        pytest.param(("generation.do_sample=True", "generation.top_k=20"), marks=pytest.mark.slow),
        pytest.param(("generation.num_beams=2",), marks=pytest.mark.slow),
    ],
    ids=["greedy", "sampling", "beams"],
)
def test_batch_size_changes_no_prediction(evaluate, decoding: tuple[str, ...]) -> None:
    arguments = ("metric.type=ADGENMetric", "eval_dataset.num_samples=5", *decoding)
    alone = evaluate("1", *arguments, "--batch_size", 1)
    batch = evaluate("8", *arguments, "--batch_size", 8)
    assert alone[:2] == batch[:2]
    assert len({line["prediction"] for line in alone[1]}) > 1


def test_perplexity(evaluate, model: GLMForCausalLM, vocabulary: Path) -> None:
    rows = adgen_rows(DEV_RECORDS, ChatGLM3Tokenizer(vocabulary), max_target_length=63)
    total, tokens = 0.0, 0
    for i in range(NUM_RECORDS):
        row = {name: value[None] for name, value in rows[i].items()}
        count = int(np.count_nonzero(row["labels"][:, 1:] != -100))
        loss = model(row["input_ids"], row["attention_mask"], row["position_ids"], labels=row["labels"])
        total, tokens = total + float(loss.asnumpy()) * count, tokens + count
    for batch_size in (3, 8):
        scores, predictions, _ = evaluate(str(batch_size), "metric.type=PerplexityMetric", "--batch_size", batch_size)
        assert predictions is None
        assert scores["num_tokens"] == tokens
        np.testing.assert_allclose(scores["loss"], total / tokens, **LOSS)
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]), rel=1e-12)


def test_perfect_answers(evaluate, answering) -> None:
    reference = sample_references()[3]  # no token twice
    scores, predictions, _ = evaluate("run", "metric.type=ADGENMetric", model=load_pretrained(answering(reference)))
    assert [line["prediction"] for line in predictions] == [reference] * NUM_RECORDS
    check_scores(scores, predictions)
    assert independent_scores(reference, reference)["bleu-4"] == 100
    assert all(predictions[3][name] == pytest.approx(100, abs=METRIC["atol"]) for name in SCORES)


def test_empty_predictions_are_counted(evaluate, answering) -> None:
    empty = load_pretrained(answering(""))
    scores, predictions, _ = evaluate("run", "metric.type=[ADGENMetric]", model=empty)
    assert [line["prediction"] for line in predictions] == [""] * NUM_RECORDS
    assert scores == {**dict.fromkeys(SCORES, 0.0), "num_samples": NUM_RECORDS, "num_empty": NUM_RECORDS}


def test_prompts_left_out_are_said(evaluate) -> None:
    """ChatGLM3's evaluation passes over prompts of max_source_length ids or more."""
    scores, _, said = evaluate(
        "run", "metric.type=ADGENMetric", "eval_dataset.max_source_length=30", "eval_dataset.num_samples=60"
    )
    assert 0 < scores["num_samples"] < 60
    assert "skipped with a prompt longer than max_source_length allows for; raise it" in said
