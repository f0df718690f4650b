"""Training rows as a MindSpore data set for MindFormers' Trainer."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from mindformers import MindFormerConfig
from mindspore import dataset as ds

from glm_ms.engine.batches import TrainingPlan, training_batches
from glm_ms.engine.from_settings import labelled_rows
from glm_ms.mindformers_api.tokenizer import BY_GENERATION
from glm_ms.settings import SettingsError
from glm_ms.settings.document import Entry
from glm_ms.settings.schema import keys_of
from glm_ms.settings.sections import EvalDatasetSettings, TrainDatasetSettings
from glm_ms.settings.values import Converter

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
