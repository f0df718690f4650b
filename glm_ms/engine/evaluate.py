"""`--run_mode eval`: scores of generated texts, perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.data import IGNORED, AdgenEvalDataset, DataError, Row
from glm_ms.engine.batches import COLUMNS, labelled_rows
from glm_ms.engine.files import replace_text
from glm_ms.engine.generate import answer_text, generation_options
from glm_ms.engine.progress import progress_bar
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import ADGENMetric, PerplexityMetric
from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer

PREDICTIONS_FILE, SCORES_FILE = "eval_predictions.jsonl", "eval_scores.json"


def evaluate(
    settings: Settings,
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures every metric of the settings on `eval_dataset`.

    Writes `eval_scores.json`, and with ADGENMetric `eval_predictions.jsonl`, into the output folder.

    Returns:
        All scores by name.

    Raises:
        DataError: no usable record.
    """
    scores: dict[str, Any] = {}
    for name in settings.metric.type:
        scores.update(_METRICS[name](settings, model, tokenizer, say))
    path = Path(settings.output_dir) / SCORES_FILE
    # JSON has no infinity; a perplexity may overflow.
    finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
    replace_text(path, json.dumps(finite, indent=2) + "\n")
    return scores


def adgen_scores(
    settings: Settings,
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """ROUGE and BLEU of the text generated for each prompt against its reference."""
    data = settings.eval_dataset
    records = AdgenEvalDataset(
        data.data_loader.dataset_dir,
        tokenizer,
        data.data_loader.origin_columns,
        data.max_source_length,
        data.max_target_length,
        data.num_samples,
    )
    say(records.describe())
    options = {
        **generation_options(settings, tokenizer, say),
        "num_return_sequences": 1,
    }  # one text per reference
    metric = ADGENMetric()
    lines = []
    with progress_bar(len(records), "generating", "record") as bar:
        for start in range(0, len(records), data.batch_size):
            batch = [records[i] for i in range(start, min(start + data.batch_size, len(records)))]
            texts = _generate(model, tokenizer, batch, data.batch_size, options)
            scores = metric.update(texts, [record["reference"] for record in batch])
            for record, text, score in zip(batch, texts, scores):
                lines.append(
                    {
                        "prompt": record["prompt"],
                        "prediction": text,
                        "reference": record["reference"],
                        **score,
                    }
                )
            bar.update(len(batch))
    path = Path(settings.output_dir) / PREDICTIONS_FILE
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    say(f"predictions beside references: {path}")
    return metric.eval()


def perplexity_scores(
    settings: Settings,
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """exp(mean loss) over all labelled tokens of the data set, each weighing the same."""
    data = settings.eval_dataset
    rows = labelled_rows(data, tokenizer)
    say(rows.describe())
    if rows.seq_length > model.config.seq_length:
        raise DataError(
            f"eval_dataset: max_source_length + max_target_length + 1 = {rows.seq_length} exceeds "
            f"model.model_config.seq_length = {model.config.seq_length}; lower the former or raise the latter"
        )
    metric = PerplexityMetric()
    with progress_bar(len(rows), "perplexity", "record") as bar:
        for start in range(0, len(rows), data.batch_size):
            batch = [rows[i] for i in range(start, min(start + data.batch_size, len(rows)))]
            metric.update(*model.loss_sum(_stack(batch, data.batch_size)))
            bar.update(len(batch))
    return metric.eval()


_METRICS = {"ADGENMetric": adgen_scores, "PerplexityMetric": perplexity_scores}


def _generate(
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    batch: list[dict[str, Any]],
    batch_size: int,
    options: dict[str, Any],
) -> list[str]:
    """Texts for a batch. A short last batch is filled up, so that no other size is compiled for it."""
    prompts = [record["input_ids"] for record in batch]
    filled = prompts + [prompts[-1]] * (batch_size - len(prompts))
    sequences = model.generate(filled, **options)
    return [answer_text(tokenizer, sequence[len(prompt) :]) for prompt, sequence in zip(prompts, sequences)]


def _stack(batch: list[Row], batch_size: int) -> tuple[np.ndarray, ...]:
    filler = {**batch[0], "labels": np.full_like(batch[0]["labels"], IGNORED)}
    rows = batch + [filler] * (batch_size - len(batch))
    return tuple(np.stack([row[name] for row in rows]) for name in COLUMNS)
