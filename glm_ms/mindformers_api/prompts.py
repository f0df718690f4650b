"""Prompts and options of `Trainer.predict`, in terms of the settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mindspore.dataset import Dataset

from glm_ms.data import DataError
from glm_ms.mindformers_api.generation import LENGTHS
from glm_ms.mindformers_api.tokenizer import ChatPrompt
from glm_ms.settings import Settings, SettingsError
from glm_ms.storage.suggest import did_you_mean

PROMPT_COLUMN = "prompt"
# What Trainer and run scripts pass along with every prediction.
_PASSED_ALONG = ("image_processor", "audio_processor", "is_full_config", "adapter_id", "save_file", "task")


def predict_data(input_data: Any, settings: Settings, folder: Path) -> str:
    """What `predict_data` of the settings would be.

    Args:
        input_data: a text or the path of a file; a list of texts; a MindSpore data set with a column `prompt`.
        settings: their own `predict_data` comes before the records of `eval_dataset`, which MindFormers takes where the
            call names no data.
        folder: for a file of prompts.

    Raises:
        DataError: something else.
    """
    if isinstance(input_data, Dataset):
        if settings.predict_data:
            return settings.predict_data
        if PROMPT_COLUMN not in input_data.get_col_names():
            raise DataError(
                f"input_data: has no column {PROMPT_COLUMN}; its columns are {', '.join(input_data.get_col_names())}"
            )
        iterator = input_data.create_dict_iterator(num_epochs=1, output_numpy=True)
        input_data = [text for item in iterator for text in item[PROMPT_COLUMN].reshape(-1).tolist()]
    texts = input_data if isinstance(input_data, list) else [input_data]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"input_data: expected texts, found {type(text).__name__}")
        if isinstance(text, ChatPrompt):
            raise DataError(
                "input_data: holds a text of build_prompt; give plain texts, predict builds the prompts"
            )
    if not isinstance(input_data, list):
        return input_data
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def set_generation(settings: Settings, options: dict[str, Any]) -> None:
    """Lays options of a call over the settings.

    Args:
        settings: changed in place.
        options: by the names of `generation` in a YAML; `batch_size`; `seed`; None stands for not given. Of
            `max_new_tokens` and `max_length` the former counts, as in MindFormers; the YAML's then count no more.

    Raises:
        SettingsError: an unknown option.
    """
    generation = settings.generation
    known = [item.name for item in dataclasses.fields(generation)]
    for name, value in options.items():
        name = LENGTHS[0] if name in LENGTHS else name
        if value is None or name in _PASSED_ALONG:
            continue
        if name == "batch_size":
            settings.predict_batch_size = value
        elif name == "seed":
            settings.seed = value
        elif name in known:
            setattr(generation, name, value)
        else:
            hint = did_you_mean(name, [*known, "batch_size", "seed"], f"; known: {', '.join(known)}")
            raise SettingsError(f"predict({name}=...): unknown option{hint}")
    if options.get("max_new_tokens") is not None:
        generation.max_length = None
    elif any(options.get(name) is not None for name in LENGTHS):
        generation.max_new_tokens = generation.max_length
