"""Training rows as a MindSpore data set for MindFormers' `build_dataset`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_type_hints

from mindformers import MindFormerConfig
from mindspore.dataset import Dataset

from glm_ms.engine.batches import TrainingPlan, training_batches
from glm_ms.engine.from_settings import labelled_rows
from glm_ms.families import family_of
from glm_ms.mindformers_api.run_yaml import CORE_TOKENIZERS, to_entry
from glm_ms.settings import SettingsError
from glm_ms.settings.schema import EvalDatasetSettings, TrainDatasetSettings, keys_of
from glm_ms.settings.values import Converter
from glm_ms.tokenizer.base import CHAT


class GLMDataset:
    """`build_dataset(config.train_dataset_task)` returns the training rows in batches.

    The data set is one epoch, in the order of the first epoch of a run: that of the file, or of `shuffle` and `seed`.
    """

    def __new__(cls, dataset_config: MindFormerConfig) -> Dataset:
        """Returns a data set and not an object of this class, because MindFormers registers only classes.

        Its columns are `glm_ms.engine.batches.TRAINING_COLUMNS`. `dataset_config` is a `train_dataset` or
        `eval_dataset` section of a YAML of glm_ms, with the keys that `mindformers_document` adds: `tokenizer`,
        `batch_size`, `seed`. Raises DataError, SettingsError or VocabularyError.
        """
        evaluates = bool(dataset_config.do_eval)
        kind, converter = EvalDatasetSettings if evaluates else TrainDatasetSettings, Converter()
        values = to_entry(_known_keys(kind, dataset_config), "dataset_config")
        section = converter.section(kind, values, "dataset_config")
        if converter.problems:
            raise SettingsError(converter.problems)
        tokenizer = dataset_config.tokenizer
        if not tokenizer or tokenizer.type not in CORE_TOKENIZERS:
            raise SettingsError(f"tokenizer.type: must be one of {', '.join(CORE_TOKENIZERS)}, found {tokenizer!r}")
        core = family_of(CORE_TOKENIZERS[tokenizer.type]).tokenizer(
            tokenizer.vocab_file, template=tokenizer.get("template", CHAT)
        )
        rows = labelled_rows(section, core)
        print(rows.describe(), file=sys.stderr, flush=True)
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


def _known_keys(kind: type, config: MindFormerConfig) -> dict[str, Any]:
    """The values of the keys of a settings class; MindFormers adds others."""
    hints = get_type_hints(kind)
    values = {item.name: config[item.name] for item in keys_of(kind) if item.name in config}
    return {
        name: _known_keys(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in values.items()
    }
