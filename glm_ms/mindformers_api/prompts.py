"""Input and options of `Trainer.predict` as settings."""

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
# The Trainer and MindFormers' run scripts pass these with every prediction.
_IGNORED = ("image_processor", "audio_processor", "is_full_config", "adapter_id", "save_file", "task")


def predict_data(input_data: Any, settings: Settings, folder: Path) -> str:
    """The value of `predict_data` for the input of a call; a list becomes a file in `folder`.

    The input is a text, the path of a file, a list of texts, or a MindSpore data set with a column `prompt`. DataError
    for anything else. The Trainer passes the records of `eval_dataset` if the call gives no input; so `predict_data` of
    the settings replaces a data set.
    """
    if isinstance(input_data, Dataset):
        if settings.predict_data:
            return settings.predict_data
        columns = input_data.get_col_names()
        if PROMPT_COLUMN not in columns:
            raise DataError(f"input_data: no column {PROMPT_COLUMN}; its columns are {', '.join(columns)}")
        iterator = input_data.create_dict_iterator(num_epochs=1, output_numpy=True)
        input_data = [text for item in iterator for text in item[PROMPT_COLUMN].reshape(-1).tolist()]
    for text in input_data if isinstance(input_data, list) else [input_data]:
        if not isinstance(text, str):
            raise DataError(f"input_data: expected texts, found {type(text).__name__}")
        if isinstance(text, ChatPrompt):
            raise DataError(
                "input_data: a text of build_prompt; give plain texts, predict builds the prompts"
            )
    if not isinstance(input_data, list):
        return input_data
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in input_data), encoding="utf-8")
    return str(path)


def set_generation(settings: Settings, options: dict[str, Any]) -> None:
    """Overwrites settings with the options of a call; SettingsError for an unknown one.

    Options are the keys of `generation` in a YAML, `batch_size`, `seed`; None means not set. `max_new_tokens` overrides
    `max_length`, as in MindFormers, and either overrides both of the YAML.
    """
    generation = settings.generation
    known = [item.name for item in dataclasses.fields(generation)]
    for name, value in options.items():
        name = LENGTHS[0] if name in LENGTHS else name
        if value is None or name in _IGNORED:
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
    lengths = [options[name] for name in LENGTHS if options.get(name) is not None]
    if options.get("max_new_tokens") is not None:
        generation.max_length = None
    elif lengths:
        generation.max_new_tokens = lengths[-1]
