"""`--run_mode eval` and `do_eval`: scores of generated texts, perplexity."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
from glm_ms.generation import GLMForCausalLM
from glm_ms.metrics import LOSS, METRICS, TEXT, Metric, takes
from glm_ms.settings import Settings
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.errors import DataError
from glm_ms.storage.integrity import file_sha256
from glm_ms.storage.run_folder import PREDICTIONS_FILE, SCORES_FILE
from glm_ms.tokenizer import SentencePieceTokenizer


def evaluate(settings: Settings, model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, say: Say) -> dict[str, Any]:
    """Measures every metric of the settings on `eval_dataset`.

    Writes `eval_scores.json`, and with a metric of texts `eval_predictions.jsonl`, into the output folder. In a
    parallel run all ranks call it, and the first writes. Returns all scores by name, on every rank.

    Raises:
        DataError: no usable record.
        RankError: the ranks have different records or weights, or a rank failed.
    """
    ranks = ranks_of(settings)
    check_equal_on_ranks(model.network.get_parameters(), ranks)
    scores = Evaluator(settings, tokenizer, say)(model)
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
    once; with `leave` full progress bars stay visible.

    Raises:
        DataError: no usable record, or rows longer than the network.
        RankError: the ranks have different records.
    """

    def __init__(self, settings: Settings, tokenizer: SentencePieceTokenizer, say: Say, leave: bool = True) -> None:
        records, vocabulary = settings.eval_dataset.data_loader.dataset_dir, settings.processor.tokenizer.vocab_file
        self._ranks, self._names = ranks_of(settings), settings.metric.type
        hashes = {"eval_dataset": file_sha256(Path(records)), "vocab_file": file_sha256(Path(vocabulary))}
        self._ranks.agree("SHA-256 of files", hashes)
        kinds: dict[str, Callable[..., _Pass]] = {TEXT: _TextPass, LOSS: _LossPass}
        inputs = dict.fromkeys(METRICS[name].input for name in self._names)
        self._passes = [kinds[kind](settings, tokenizer, say, leave) for kind in inputs]

    def __call__(self, model: GLMForCausalLM) -> dict[str, Any]:
        """All scores of a network by name, on every rank. The network may be in training and is not changed."""
        # The first rank alone scores: ROUGE and BLEU of the same texts on every rank of a server would share its cores.
        metrics = [METRICS[name]() for name in self._names if self._ranks.first]
        for evaluation in self._passes:
            evaluation.run(model, [metric for metric in metrics if metric.input == evaluation.input])
        return self._ranks.from_first({score: value for one in metrics for score, value in one.result().items()})


class _Pass(ABC):
    """One pass over `eval_dataset`, for all metrics with the same input."""

    input: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, settings: Settings, records: EvalDataset | TrainDataset, say: Say, leave: bool) -> None:
        number, size = len(records), settings.eval_dataset.batch_size
        self._records, self._batch_size, self._leave = records, size, leave
        self._batches = [range(start, min(start + size, number)) for start in range(0, number, size)]
        self._ranks = ranks_of(settings)
        if len(self._batches) < self._ranks.size:
            say(
                f"{number} records in batches of {size} keep {len(self._batches)} of {self._ranks.size} ranks busy; "
                "a smaller eval_dataset.batch_size spreads them"
            )

    @abstractmethod
    def run(self, model: GLMForCausalLM, metrics: Sequence[Metric]) -> None:
        """Updates the metrics with all records; every rank takes part, also without metrics."""

    @abstractmethod
    def _compute(self, model: GLMForCausalLM, batch: list[Any]) -> Any:
        """The result of a batch of records, as JSON. A short batch is filled up, so that no other shape is compiled."""

    def _results(self, model: GLMForCausalLM) -> Iterator[tuple[list[Any], Any]]:
        """The records and the result of every batch; one rank computes it, all receive it."""

        def compute(numbers: range) -> Any:
            return self._compute(model, [self._records[i] for i in numbers])

        show = self._ranks.first
        with progress_bar(len(self._records), self.label, "record", show=show, leave=self._leave) as bar:
            for numbers, result in zip(self._batches, self._ranks.share_out(self._batches, compute)):
                yield [self._records[i] for i in numbers], result
                bar.update(len(numbers))


class _TextPass(_Pass):
    """Generates an answer to each prompt, to compare with its reference."""

    input, label = TEXT, "generating"

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
        self._tokenizer, self._path = tokenizer, Path(settings.output_dir) / PREDICTIONS_FILE
        super().__init__(settings, records, say, leave)

    def run(self, model: GLMForCausalLM, metrics: Sequence[Metric]) -> None:
        """Updates the metrics and writes the predictions with the scores of each."""
        lines = []
        for batch, texts in self._results(model):
            references = [record["reference"] for record in batch]
            scores = [metric.update(texts, references) or [{}] * len(batch) for metric in metrics]
            for record, text, *own in zip(batch, texts, *scores):
                line = {"prompt": record["prompt"], "prediction": text, "reference": record["reference"]}
                for score in own:
                    line.update(score)
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if self._ranks.first:
            replace_text(self._path, "".join(lines))

    def _compute(self, model: GLMForCausalLM, batch: list[dict[str, Any]]) -> list[str]:
        prompts = [record["input_ids"] for record in batch]
        sequences = model.generate(prompts + [prompts[-1]] * (self._batch_size - len(batch)), **self._options)
        stop = self._options["eos_token_id"]
        return [answer_text(self._tokenizer, ids[len(prompt) :], stop) for prompt, ids in zip(prompts, sequences)]


class _LossPass(_Pass):
    """Summed loss and number of target tokens of the labelled rows; every token has the same weight."""

    input, label = LOSS, "perplexity"

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

    def run(self, model: GLMForCausalLM, metrics: Sequence[Metric]) -> None:
        """Updates the metrics."""
        for _, sums in self._results(model):
            for metric in metrics:
                metric.update(*sums)

    def _compute(self, model: GLMForCausalLM, batch: list[Row]) -> tuple[float, int]:
        filler = {**batch[0], "labels": np.full_like(batch[0]["labels"], IGNORED)}
        rows = batch + [filler] * (self._batch_size - len(batch))
        return model.loss_sum(tuple(np.stack([row[name] for row in rows]) for name in COLUMNS))
