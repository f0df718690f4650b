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
from glm_ms.data.rows import IGNORED, Row, equally_long, shortened
from glm_ms.engine.answers import answers_in_order
from glm_ms.engine.batches import COLUMNS
from glm_ms.engine.from_settings import generation_options, labelled_rows, prompts_with_references
from glm_ms.engine.predict import answer_text, check_prompt_lengths
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import check_equal_on_ranks, ranks_of
from glm_ms.engine.report.progress import progress_bar
from glm_ms.engine.results import ResultLines, result_folder
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import LOSS, METRICS, TEXT, Metric, takes
from glm_ms.ops.registry import device
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

    The ranks of a parallel run take parts of the records in turn. Their results are those of a single process, and so
    are the scores and the predictions, which the first rank writes into the output folder. `say` takes lines for the
    user, once; with `leave` full progress bars stay visible. `made_of` describes the records, for `result_folder`.

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
    """One pass over `eval_dataset`, for all metrics with the same input. It has a result for each record or batch."""

    input: ClassVar[str]
    label: ClassVar[str]
    file: ClassVar[str]  # of its results, a line for each
    fields: ClassVar[dict[str, type]]  # of a line, those that `_result` reads

    def __init__(self, settings: Settings, records: EvalDataset | TrainDataset, say: Say, leave: bool) -> None:
        number, size = len(records), settings.eval_dataset.batch_size
        self._records, self._batch_size, self._leave = records, size, leave
        self._path = Path(settings.output_dir) / self.file
        self._ranks = ranks_of(settings)
        batches = -(-number // size)
        if batches < self._ranks.size:
            say(
                f"{number} records in batches of {size} keep {batches} of {self._ranks.size} ranks busy; "
                "a smaller eval_dataset.batch_size spreads them"
            )

    def run(self, model: GLMForCausalLM, metrics: Sequence[Metric], grows: bool) -> None:
        """Updates the metrics with all records and writes the results, as `Evaluator` does; every rank takes part, also
        without metrics."""
        target = nullcontext(self._path) if grows or not self._ranks.first else staged(self._path)
        with target as path, ResultLines(path, self.fields, self._ranks) as lines:
            stored = [self._result(line) for line in lines.stored]
            results = chain(stored, self._compute(model, len(stored)))
            show = self._ranks.first
            with progress_bar(len(self._records), self.label, "record", show=show, leave=self._leave) as bar:
                for number, result in enumerate(results):
                    line = self._score(number, result, metrics)
                    if number >= len(stored):
                        lines.append(line)
                    bar.update(self._size(number))

    @abstractmethod
    def _compute(self, model: GLMForCausalLM, start: int) -> Iterator[Any]:
        """The results from number `start` on, as JSON, in order, on every rank."""

    @abstractmethod
    def _score(self, number: int, result: Any, metrics: Sequence[Metric]) -> dict[str, Any]:
        """Updates the metrics with a result; returns its line."""

    @abstractmethod
    def _result(self, line: dict[str, Any]) -> Any:
        """The result of a line."""

    @abstractmethod
    def _size(self, number: int) -> int:
        """Records of a result."""


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
        self._prompts = [records[i]["input_ids"] for i in range(len(records))]
        check_prompt_lengths(self._prompts, options, settings.model.model_config.seq_length)
        self._tokenizer = tokenizer
        super().__init__(settings, records, say, leave)

    def _score(self, number: int, result: str, metrics: Sequence[Metric]) -> dict[str, Any]:
        record = self._records[number]
        line = {"prompt": record["prompt"], "prediction": result, "reference": record["reference"]}
        for metric in metrics:
            for score in metric.update([result], [record["reference"]]) or []:
                line.update(score)
        return line

    def _result(self, line: dict[str, Any]) -> str:
        return line["prediction"]

    def _compute(self, model: GLMForCausalLM, start: int) -> Iterator[str]:
        stop = self._options["eos_token_id"]
        answers = answers_in_order(model, self._prompts, self._options, self._batch_size, self._ranks, start)
        return (answer_text(self._tokenizer, ids, stop) for (ids,) in answers)

    def _size(self, number: int) -> int:
        return 1


class _LossPass(_Pass):
    """Summed loss and number of target tokens of the batches; every token has the same weight."""

    input, label, file = LOSS, "perplexity", LOSSES_FILE
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
        self._static_shapes = device() == "Ascend"
        super().__init__(settings, rows, say, leave)

    def _score(self, number: int, result: Any, metrics: Sequence[Metric]) -> dict[str, Any]:
        for metric in metrics:
            metric.update(*result)
        return {"loss_sum": result[0], "num_tokens": result[1]}

    def _result(self, line: dict[str, Any]) -> Any:
        return line["loss_sum"], line["num_tokens"]

    def _batch(self, number: int) -> range:
        start = number * self._batch_size
        return range(start, min(start + self._batch_size, len(self._records)))

    def _size(self, number: int) -> int:
        return len(self._batch(number))

    def _compute(self, model: GLMForCausalLM, start: int) -> Iterator[tuple[float, int]]:
        left = range(start, -(-len(self._records) // self._batch_size))
        return self._ranks.share_out(left, lambda number: self._loss(model, self._batch(number)))

    def _loss(self, model: GLMForCausalLM, numbers: range) -> tuple[float, int]:
        """Of one batch; a short one is filled up, so that no other shape is compiled."""
        batch: list[Row] = [self._records[i] for i in numbers]
        filler = {**batch[0], "labels": np.full_like(batch[0]["labels"], IGNORED)}
        rows = batch + [filler] * (self._batch_size - len(batch))
        if not self._static_shapes:
            rows = [shortened(row) for row in rows]
        columns = (equally_long(name, [row[name] for row in rows]) for name in COLUMNS)
        total, tokens = model.loss_sum([np.stack(column) for column in columns])
        if not math.isfinite(total):
            raise FloatingPointError(
                f"evaluation: a loss is {total}: the weights contain NaN or infinity, or have diverged; use an earlier "
                "checkpoint"
            )
        return total, tokens
