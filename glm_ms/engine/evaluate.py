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
from glm_ms.engine.ranks import Ranks, check_equal_on_ranks, ranks_of
from glm_ms.engine.records import labelled_rows, prompts_with_references
from glm_ms.engine.report.progress import progress_bar
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import ADGENMetric, PerplexityMetric
from glm_ms.settings import Settings
from glm_ms.storage.integrity import file_sha256
from glm_ms.tokenizer import SentencePieceTokenizer


def evaluate(
    settings: Settings,
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures every metric of the settings on `eval_dataset`.

    Writes `eval_scores.json`, and with ADGENMetric `eval_predictions.jsonl`, into the output folder. In a parallel
    run all ranks call it, and the first writes.

    Returns:
        All scores by name, on every rank.

    Raises:
        DataError: no usable record.
        RankError: the ranks have different records or weights, or one has failed.
    """
    ranks = ranks_of(settings)
    check_equal_on_ranks(model.network.get_parameters(), ranks)
    scores = Evaluator(settings, tokenizer, say)(model)
    if not ranks.first:
        return scores
    path = Path(settings.output_dir) / SCORES_FILE
    # JSON has no infinity; a perplexity may overflow.
    finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
    replace_text(path, json.dumps(finite, indent=2) + "\n")
    if (Path(settings.output_dir) / PREDICTIONS_FILE).is_file() and "ADGENMetric" in settings.metric.type:
        say(f"predictions beside references: {Path(settings.output_dir) / PREDICTIONS_FILE}")
    return scores


class Evaluator:
    """Measures networks on `eval_dataset`, as often as wanted; the records are read once.

    The ranks of a parallel run take the batches in turn. A batch holds the same records and is computed by the same
    calls as in one process, so the scores and the file of predictions are the same too.

    Args:
        settings: `eval_dataset`, `metric`, `generation`; the lengths are held to the network's.
        tokenizer: of the records.
        say: takes lines for the user, once.
        leave: the bars stay when they are full.

    Raises:
        DataError: no usable record, or rows longer than the network.
        RankError: the ranks have different records.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: SentencePieceTokenizer,
        say: Callable[[str], None],
        leave: bool = True,
    ) -> None:
        ranks = ranks_of(settings)
        files = {"eval_dataset": settings.eval_dataset.data_loader.dataset_dir}
        files["vocab_file"] = settings.processor.tokenizer.vocab_file
        ranks.agree("SHA-256 of files", {name: file_sha256(Path(path)) for name, path in files.items()})
        builders = {"ADGENMetric": _Adgen, "PerplexityMetric": _Perplexity}
        self._metrics = [
            builders[name](settings, tokenizer, say, ranks, leave) for name in settings.metric.type
        ]

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        """All scores by name, of a network that may be in training; nothing of it is changed.

        All ranks call it and get the scores. The first writes `eval_predictions.jsonl` into the output folder with
        ADGENMetric.
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
        ranks: Ranks,
        leave: bool,
    ) -> None:
        data = settings.eval_dataset
        self._records = prompts_with_references(data, tokenizer, settings.generation)
        say(self._records.describe())
        options = generation_options(settings, tokenizer, say)
        stop = list(options["eos_token_id"])
        if data.data_loader.type != "ADGenDataLoader":
            # A thought before a tool call is one message, and the call the next: both are the assistant's.
            stop.append(tokenizer.get_command("<|assistant|>"))
        # One text per reference.
        self._options = {**options, "eos_token_id": stop, "num_return_sequences": 1}
        prompts = [self._records[i]["input_ids"] for i in range(len(self._records))]
        check_prompt_lengths(prompts, options, settings.model.model_config.seq_length)
        self._tokenizer, self._batch_size, self._leave = tokenizer, data.batch_size, leave
        self._path, self._ranks = Path(settings.output_dir) / PREDICTIONS_FILE, ranks
        _remark_on_idle_ranks(len(prompts), data.batch_size, ranks, say)

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        def generate(places: range) -> list[str]:
            batch = [self._records[i] for i in places]
            return _generate(model, self._tokenizer, batch, self._batch_size, self._options)

        metric, lines, number = ADGENMetric(), [], len(self._records)
        batches = _batches(number, self._batch_size)
        with progress_bar(number, "generating", "record", show=self._ranks.first, leave=self._leave) as bar:
            for places, texts in zip(batches, self._ranks.share_out(batches, generate)):
                if not self._ranks.first:
                    continue
                batch = [self._records[i] for i in places]
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
        if self._ranks.first:
            replace_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return self._ranks.from_first(metric.eval() if self._ranks.first else None)


class _Perplexity:
    """exp(mean loss) over all labelled tokens of the data set, each weighing the same."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: SentencePieceTokenizer,
        say: Callable[[str], None],
        ranks: Ranks,
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
        self._batch_size, self._leave, self._ranks = settings.eval_dataset.batch_size, leave, ranks
        _remark_on_idle_ranks(len(rows), self._batch_size, ranks, say)

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        def measure(places: range) -> tuple[float, int]:
            return model.loss_sum(_stack([self._rows[i] for i in places], self._batch_size))

        metric, number = PerplexityMetric(), len(self._rows)
        batches = _batches(number, self._batch_size)
        with progress_bar(number, "perplexity", "record", show=self._ranks.first, leave=self._leave) as bar:
            for places, sums in zip(batches, self._ranks.share_out(batches, measure)):
                metric.update(*sums)
                bar.update(len(places))
        return metric.eval()


def _batches(number: int, batch_size: int) -> list[range]:
    """The places 0, 1, ... number - 1 in batches, of which the last may be short."""
    return [range(start, min(start + batch_size, number)) for start in range(0, number, batch_size)]


def _remark_on_idle_ranks(number: int, batch_size: int, ranks: Ranks, say: Callable[[str], None]) -> None:
    busy = len(_batches(number, batch_size))
    if busy < ranks.size:
        say(
            f"{number} records in batches of {batch_size} keep {busy} of {ranks.size} ranks busy; a smaller "
            "eval_dataset.batch_size spreads them"
        )


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
    stop = options["eos_token_id"]
    return [answer_text(tokenizer, ids[len(prompt) :], stop) for prompt, ids in zip(prompts, sequences)]


def _stack(batch: list[Row], batch_size: int) -> tuple[np.ndarray, ...]:
    filler = {**batch[0], "labels": np.full_like(batch[0]["labels"], IGNORED)}
    rows = batch + [filler] * (batch_size - len(batch))
    return tuple(np.stack([row[name] for row in rows]) for name in COLUMNS)
