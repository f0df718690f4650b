"""`--run_mode eval` and `do_eval`: scores of generated texts, perplexity."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.rows import IGNORED, Row
from glm_ms.engine.batches import COLUMNS
from glm_ms.engine.from_settings import generation_options, labelled_rows, prompts_with_references
from glm_ms.engine.predict import answer_text, check_prompt_lengths
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import check_equal_on_ranks, ranks_of
from glm_ms.engine.report.progress import progress_bar
from glm_ms.engine.results import ResultLines, result_folder
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import LOSS, METRICS, TEXT, Metric, takes
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_text, staged
from glm_ms.storage.errors import DataError
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.run_folder import LOSSES_FILE, PREDICTIONS_FILE, SCORES_FILE
from glm_ms.tokenizer import SentencePieceTokenizer


def evaluate(settings: Settings, model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, say: Say) -> dict[str, Any]:
    """Measures every metric of the settings on `eval_dataset`.

    Writes `eval_scores.json`, and as they come `eval_predictions.jsonl` with a metric of texts and `eval_losses.jsonl`
    with one of losses, into the output folder; with `resume` the lines that are there stay. In a parallel run all ranks
    call it, and the first writes. Returns all scores by name, on every rank.

    Raises:
        DataError: no usable record.
        CheckpointError: the results in the output folder are of another job.
        WriteError: a result cannot be written.
        FloatingPointError: the network gives NaN or infinity.
        RankError: the ranks have different records or weights, or a rank failed.
    """
    ranks = ranks_of(settings)
    check_equal_on_ranks(model.network.get_parameters(), ranks)
    evaluator = Evaluator(settings, tokenizer, say)
    with result_folder(settings, evaluator.made_of, ranks, say):
        scores = evaluator(model, grows=True)
        if ranks.first:
            # JSON has no infinity; a perplexity may overflow.
            finite = {k: v if math.isfinite(v) else None for k, v in scores.items()}
            replace_text(Path(settings.output_dir) / SCORES_FILE, json.dumps(finite, indent=2) + "\n")
    if takes(TEXT, settings.metric.type):
        say(f"predictions beside references: {Path(settings.output_dir) / PREDICTIONS_FILE}")
    return scores


class Evaluator:
    """Measures networks on `eval_dataset` any number of times; reads the records once.

    The ranks of a parallel run take the batches in turn. Batches and calls are those of a single process, and so are
    the scores and the predictions, which the first rank writes into the output folder. `say` takes lines for the user,
    once; with `leave` full progress bars stay visible. `made_of` describes the records, for `result_folder`.

    Raises:
        DataError: no usable record, or rows longer than the network.
        RankError: the ranks have different records.
    """

    def __init__(self, settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, leave: bool = True) -> None:
        records, vocabulary = settings.eval_dataset.data_loader.dataset_dir, settings.processor.tokenizer.vocab_file
        self._ranks, self._names = ranks_of(settings), settings.metric.type
        hashes = {"eval_dataset": file_sha256(Path(records)), "vocab_file": file_sha256(Path(vocabulary))}
        self._ranks.agree("SHA-256 of files", hashes)
        data = settings.to_dict()["eval_dataset"]
        data["data_loader"]["dataset_dir"] = hashes["eval_dataset"]  # the content counts, not the path
        self.made_of = {"eval_dataset": data, "metric": self._names}
        kinds: dict[str, Callable[..., _Pass]] = {TEXT: _TextPass, LOSS: _LossPass}
        inputs = dict.fromkeys(METRICS[name].input for name in self._names)
        self._passes = [kinds[kind](settings, tokenizer, say, leave) for kind in inputs]

    def __call__(self, model: GLMForCausalLM, grows: bool = False) -> dict[str, Any]:
        """All scores of a network by name, on every rank. The network may be in training and is not changed.

        With `grows` the files of results grow while it runs, and it continues those that are there; else they are
        replaced at the end. Raises as `evaluate`.
        """
        # The first rank alone scores: ROUGE and BLEU of the same texts on every rank of a server would share its cores.
        metrics = [METRICS[name]() for name in self._names if self._ranks.first]
        for evaluation in self._passes:
            evaluation.run(model, [metric for metric in metrics if metric.input == evaluation.input], grows)
        return self._ranks.from_first({score: value for one in metrics for score, value in one.result().items()})


class _Pass(ABC):
    """One pass over `eval_dataset`, for all metrics with the same input."""

    input: ClassVar[str]
    label: ClassVar[str]
    file: ClassVar[str]  # of its results, a line for each record or, with `by_batch`, for each batch
    fields: ClassVar[dict[str, type]]  # of a line, those that `_result` reads
    by_batch: ClassVar[bool] = False

    def __init__(self, settings: Settings, records: EvalDataset | TrainDataset, say: Say, leave: bool) -> None:
        number, size = len(records), settings.eval_dataset.batch_size
        self._records, self._batch_size, self._leave = records, size, leave
        self._path = Path(settings.output_dir) / self.file
        self._batches = [range(start, min(start + size, number)) for start in range(0, number, size)]
        self._ranks = ranks_of(settings)
        if len(self._batches) < self._ranks.size:
            say(
                f"{number} records in batches of {size} keep {len(self._batches)} of {self._ranks.size} ranks busy; "
                "a smaller eval_dataset.batch_size spreads them"
            )

    def run(self, model: GLMForCausalLM, metrics: Sequence[Metric], grows: bool) -> None:
        """Updates the metrics with all records and writes the results, as `Evaluator` does; every rank takes part, also
        without metrics."""
        lines_of_batch = 1 if self.by_batch else self._batch_size
        total = len(self._batches) if self.by_batch else len(self._records)
        target = nullcontext(self._path) if grows or not self._ranks.first else staged(self._path)
        with target as path, ResultLines(path, self.fields, lines_of_batch, total, self._ranks) as lines:
            stored = [lines.stored[i : i + lines_of_batch] for i in range(0, len(lines.stored), lines_of_batch)]
            for number, (batch, result) in enumerate(self._results(model, [self._result(one) for one in stored])):
                new = self._score(batch, result, metrics)
                if number >= len(stored):
                    lines.append(new)

    @abstractmethod
    def _compute(self, model: GLMForCausalLM, batch: list[Any]) -> Any:
        """The result of a batch of records, as JSON. A short batch is filled up, so that no other shape is compiled."""

    @abstractmethod
    def _score(self, batch: list[Any], result: Any, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
        """Updates the metrics with a batch; returns its lines."""

    @abstractmethod
    def _result(self, lines: list[dict[str, Any]]) -> Any:
        """The result of `_compute`, from the lines of a batch."""

    def _results(self, model: GLMForCausalLM, stored: list[Any]) -> Iterator[tuple[list[Any], Any]]:
        """The records and the result of every batch, first those that are stored; one rank computes, all receive."""

        def compute(numbers: range) -> Any:
            return self._compute(model, [self._records[i] for i in numbers])

        show, left = self._ranks.first, self._batches[len(stored) :]
        results = chain(stored, self._ranks.share_out(left, compute))
        with progress_bar(len(self._records), self.label, "record", show=show, leave=self._leave) as bar:
            for numbers, result in zip(self._batches, results):
                yield [self._records[i] for i in numbers], result
                bar.update(len(numbers))


class _TextPass(_Pass):
    """Generates an answer to each prompt, to compare with its reference."""

    input, label, file = TEXT, "generating", PREDICTIONS_FILE
    fields: ClassVar[dict[str, type]] = {"prediction": str}

    def __init__(self, settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, leave: bool) -> None:
        data = settings.eval_dataset
        records = prompts_with_references(data, tokenizer, settings.generation)
        say(records.describe())
        options = generation_options(settings, tokenizer, say)
        stop = options["eos_token_id"] + [tokenizer.get_command(token) for token in records.stop_tokens]
        # One text per reference.
        self._options = {**options, "eos_token_id": stop, "num_return_sequences": 1}
        prompts = [records[i]["input_ids"] for i in range(len(records))]
        check_prompt_lengths(prompts, options, settings.model.model_config.seq_length)
        self._tokenizer = tokenizer
        super().__init__(settings, records, say, leave)

    def _score(self, batch: list[Any], result: list[str], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
        references = [record["reference"] for record in batch]
        scores = [metric.update(result, references) or [{}] * len(batch) for metric in metrics]
        lines = []
        for record, text, *own in zip(batch, result, *scores):
            lines.append({"prompt": record["prompt"], "prediction": text, "reference": record["reference"]})
            for score in own:
                lines[-1].update(score)
        return lines

    def _result(self, lines: list[dict[str, Any]]) -> list[str]:
        return [line["prediction"] for line in lines]

    def _compute(self, model: GLMForCausalLM, batch: list[dict[str, Any]]) -> list[str]:
        prompts = [record["input_ids"] for record in batch]
        sequences = model.generate(prompts + [prompts[-1]] * (self._batch_size - len(batch)), **self._options)
        stop = self._options["eos_token_id"]
        return [answer_text(self._tokenizer, ids[len(prompt) :], stop) for prompt, ids in zip(prompts, sequences)]


class _LossPass(_Pass):
    """Summed loss and number of target tokens of the labelled rows; every token has the same weight."""

    input, label, file, by_batch = LOSS, "perplexity", LOSSES_FILE, True
    fields: ClassVar[dict[str, type]] = {"loss_sum": float, "num_tokens": int}

    def __init__(self, settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, leave: bool) -> None:
        rows = labelled_rows(settings.eval_dataset, tokenizer)
        say(rows.describe())
        seq_length = settings.model.model_config.seq_length
        if rows.seq_length > seq_length:
            raise DataError(
                f"eval_dataset: max_source_length + max_target_length + 1 = {rows.seq_length} exceeds "
                f"model.model_config.seq_length = {seq_length}; lower the former or raise the latter"
            )
        super().__init__(settings, rows, say, leave)

    def _score(self, batch: list[Row], result: Any, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
        for metric in metrics:
            metric.update(*result)
        return [{"loss_sum": result[0], "num_tokens": result[1]}]

    def _result(self, lines: list[dict[str, Any]]) -> Any:
        return lines[0]["loss_sum"], lines[0]["num_tokens"]

    def _compute(self, model: GLMForCausalLM, batch: list[Row]) -> tuple[float, int]:
        filler = {**batch[0], "labels": np.full_like(batch[0]["labels"], IGNORED)}
        rows = batch + [filler] * (self._batch_size - len(batch))
        total, tokens = model.loss_sum(tuple(np.stack([row[name] for row in rows]) for name in COLUMNS))
        if not math.isfinite(total):
            raise FloatingPointError(
                f"evaluation: a loss is {total}: the weights contain NaN or infinity, or have diverged; use an earlier "
                "checkpoint"
            )
        return total, tokens
