"""`--run_mode eval` and `do_eval`: scores of generated texts, perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glm_ms.data import IGNORED, DataError, Row
from glm_ms.engine.batches import COLUMNS
from glm_ms.engine.files import PREDICTIONS_FILE, SCORES_FILE, replace_text
from glm_ms.engine.generate import answer_text, check_prompt_lengths, generation_options
from glm_ms.engine.progress import progress_bar
from glm_ms.engine.records import labelled_rows, prompts_with_references
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import ADGENMetric, PerplexityMetric
from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer


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
    scores = Evaluator(settings, tokenizer, say)(model)
    path = Path(settings.output_dir) / SCORES_FILE
    # JSON has no infinity; a perplexity may overflow.
    finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
    replace_text(path, json.dumps(finite, indent=2) + "\n")
    if (Path(settings.output_dir) / PREDICTIONS_FILE).is_file() and "ADGENMetric" in settings.metric.type:
        say(f"predictions beside references: {Path(settings.output_dir) / PREDICTIONS_FILE}")
    return scores


class Evaluator:
    """Measures networks on `eval_dataset`, as often as wanted; the records are read once.

    Args:
        settings: `eval_dataset`, `metric`, `generation`; the lengths are held to the network's.
        tokenizer: of the records.
        say: takes lines for the user, once.
        leave: the bars stay when they are full.

    Raises:
        DataError: no usable record, or rows longer than the network.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: SentencePieceTokenizer,
        say: Callable[[str], None],
        leave: bool = True,
    ) -> None:
        builders = {"ADGENMetric": _Adgen, "PerplexityMetric": _Perplexity}
        self._metrics = [builders[name](settings, tokenizer, say, leave) for name in settings.metric.type]

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        """All scores by name, of a network that may be in training; nothing of it is changed.

        Writes `eval_predictions.jsonl` into the output folder with ADGENMetric.
        """
        scores: dict[str, Any] = {}
        for metric in self._metrics:
            scores.update(metric(model))
        return scores


class _Adgen:
    """ROUGE and BLEU of the text generated for each prompt against its reference."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: SentencePieceTokenizer,
        say: Callable[[str], None],
        leave: bool,
    ) -> None:
        data = settings.eval_dataset
        self._records = prompts_with_references(data, tokenizer, settings.generation)
        say(self._records.describe())
        options = generation_options(settings, tokenizer, say)
        self._options = {**options, "num_return_sequences": 1}  # one text per reference
        prompts = [self._records[i]["input_ids"] for i in range(len(self._records))]
        check_prompt_lengths(prompts, options, settings.model.model_config.seq_length)
        self._tokenizer, self._batch_size, self._leave = tokenizer, data.batch_size, leave
        self._path = Path(settings.output_dir) / PREDICTIONS_FILE

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        metric, lines, number = ADGENMetric(), [], len(self._records)
        with progress_bar(number, "generating", "record", leave=self._leave) as bar:
            for start in range(0, number, self._batch_size):
                batch = [self._records[i] for i in range(start, min(start + self._batch_size, number))]
                texts = _generate(model, self._tokenizer, batch, self._batch_size, self._options)
                scores = metric.update(texts, [record["reference"] for record in batch])
                lines += [
                    {
                        "prompt": record["prompt"],
                        "prediction": text,
                        "reference": record["reference"],
                        **score,
                    }
                    for record, text, score in zip(batch, texts, scores)
                ]
                bar.update(len(batch))
        replace_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return metric.eval()


class _Perplexity:
    """exp(mean loss) over all labelled tokens of the data set, each weighing the same."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: SentencePieceTokenizer,
        say: Callable[[str], None],
        leave: bool,
    ) -> None:
        self._rows = rows = labelled_rows(settings.eval_dataset, tokenizer)
        say(rows.describe())
        seq_length = settings.model.model_config.seq_length
        if rows.seq_length > seq_length:
            raise DataError(
                f"eval_dataset: max_source_length + max_target_length + 1 = {rows.seq_length} exceeds "
                f"model.model_config.seq_length = {seq_length}; lower the former or raise the latter"
            )
        self._batch_size, self._leave = settings.eval_dataset.batch_size, leave

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        metric, number = PerplexityMetric(), len(self._rows)
        with progress_bar(number, "perplexity", "record", leave=self._leave) as bar:
            for start in range(0, number, self._batch_size):
                batch = [self._rows[i] for i in range(start, min(start + self._batch_size, number))]
                metric.update(*model.loss_sum(_stack(batch, self._batch_size)))
                bar.update(len(batch))
        return metric.eval()


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
