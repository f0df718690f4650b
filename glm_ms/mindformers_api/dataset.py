"""Training rows as a MindSpore data set for MindFormers' Trainer, and rows of a data set that it was given."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, get_type_hints

import numpy as np
from mindformers import MindFormerConfig
from mindspore import dataset as ds

from glm_ms.data import DataError, Row
from glm_ms.engine.batches import COLUMNS, TrainingPlan, training_batches
from glm_ms.engine.records import labelled_rows
from glm_ms.mindformers_api.tokenizer import BY_GENERATION
from glm_ms.settings import SettingsError
from glm_ms.settings.convert import Converter
from glm_ms.settings.document import Entry
from glm_ms.settings.schema import keys_of
from glm_ms.settings.sections import EvalDatasetSettings, TrainDatasetSettings

_TOKENIZERS = {kind.__name__: kind for kind in BY_GENERATION.values()}


class GLMDataset:
    """`build_dataset(config.train_dataset_task)`: the rows that training takes, as batches of a MindSpore data set.

    One pass, in the order of the first epoch: that of the file, or the one that `shuffle` and `seed` give.

    Args:
        dataset_config: a `train_dataset` or `eval_dataset` section of a YAML of this project, with `tokenizer`, and
            with `batch_size` and `seed` as MindFormers puts them there.

    Returns:
        A MindSpore data set of `glm_ms.engine.batches.TRAINING_COLUMNS`.

    Raises:
        DataError, SettingsError, VocabularyError: records, keys or vocabulary that cannot be used.
    """

    def __new__(cls, dataset_config: MindFormerConfig) -> ds.Dataset:
        """A data set, not an object of this class: MindFormers knows only classes."""
        evaluates = bool(dataset_config.do_eval)
        section = _section(EvalDatasetSettings if evaluates else TrainDatasetSettings, dataset_config)
        tokenizer = dataset_config.tokenizer
        if not tokenizer or tokenizer.type not in _TOKENIZERS:
            raise SettingsError(
                f"tokenizer.type: must be one of {', '.join(_TOKENIZERS)}, found {tokenizer!r}"
            )
        rows = labelled_rows(section, _TOKENIZERS[tokenizer.type](tokenizer.vocab_file).core)
        plan = TrainingPlan(
            num_rows=len(rows),
            batch_size=dataset_config.batch_size or 1,
            accumulation_steps=1,
            num_ranks=1,
            epochs=1,
            max_steps=None,
            seed=dataset_config.seed or 0,
            shuffle=section.data_loader.shuffle,
            drop_remainder=not evaluates and section.drop_remainder,
        )
        return training_batches(rows, plan)


class DatasetRows:
    """The rows of a MindSpore data set, in memory, in the order in which it yields them.

    Args:
        dataset: batches [B, S] or rows [S] of integers: `input_ids` and `labels` (-100 where a token carries no loss),
            and optionally `attention_mask` (default: nothing is padding) and `position_ids` (default: counted from the
            mask).

    Attributes:
        seq_length: ids in a row.
        batch_size: rows of its batches.
        sha256: of all rows.

    Raises:
        DataError: a column is missing, or rows are not integers of one length.
    """

    def __init__(self, dataset: ds.Dataset) -> None:
        names = dataset.get_col_names()
        missing = [name for name in ("input_ids", "labels") if name not in names]
        if missing:
            raise DataError(f"train_dataset: has no column {missing[0]}; its columns are {', '.join(names)}")
        found = [name for name in COLUMNS if name in names]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for item in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
            for name in found:
                parts[name].append(np.atleast_2d(item[name]))
        if not parts["input_ids"]:
            raise DataError("train_dataset: holds no rows")
        self.batch_size = len(parts["input_ids"][0])
        self._columns = {name: _joined(name, arrays) for name, arrays in parts.items()}
        self._fill_in()
        self.seq_length = self._columns["input_ids"].shape[1]
        digest = hashlib.sha256()
        for name in COLUMNS:
            digest.update(self._columns[name].tobytes())
        self.sha256 = digest.hexdigest()

    def _fill_in(self) -> None:
        columns, shape = self._columns, self._columns["input_ids"].shape
        columns.setdefault("attention_mask", np.ones(shape, np.int32))
        mask = columns["attention_mask"]
        columns.setdefault("position_ids", (np.maximum(np.cumsum(mask, 1) - 1, 0) * mask).astype(np.int32))
        for name, values in columns.items():
            if values.shape != shape:
                raise DataError(f"train_dataset: {name} has shape {values.shape}, input_ids {shape}")

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `attention_mask`, `position_ids`: int32 [seq_length] each."""
        return {name: self._columns[name][index] for name in COLUMNS}

    def describe(self) -> str:
        """One line for the user."""
        return f"train_dataset: {len(self)} rows of {self.seq_length} tokens, read into memory"


def _joined(name: str, arrays: list[np.ndarray]) -> np.ndarray:
    lengths = sorted({array.shape[-1] for array in arrays})
    if len(lengths) > 1 or arrays[0].ndim != 2 or not np.issubdtype(arrays[0].dtype, np.integer):
        raise DataError(
            f"train_dataset: {name}: expected rows of integers of one length, found {arrays[0].dtype} of {lengths}"
        )
    return np.concatenate(arrays).astype(np.int32)


def _section(kind: type, config: MindFormerConfig) -> Any:
    """Our keys of a section as its dataclass."""
    converter = Converter()
    section = converter.section(kind, _entries(kind, config), "dataset_config")
    if converter.problems:
        raise SettingsError(converter.problems)
    return section


def _entries(kind: type, config: MindFormerConfig) -> Entry:
    hints = get_type_hints(kind)
    entries = {}
    for item in keys_of(kind):
        if item.name not in config:
            continue
        value = config[item.name]
        if dataclasses.is_dataclass(hints[item.name]):
            entries[item.name] = _entries(hints[item.name], value)
        elif isinstance(value, (list, tuple)):
            entries[item.name] = Entry([Entry(part, "dataset_config") for part in value], "dataset_config")
        else:
            entries[item.name] = Entry(value, "dataset_config")
    return Entry(entries, "dataset_config")
