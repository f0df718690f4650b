"""Steps of the jobs of `GLMTextGenerationTrainer`: checks, checkpoints, and objects and options of the caller."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers import MindFormerConfig
from mindformers.tools.utils import get_real_rank
from mindspore.dataset import Dataset

from glm_ms.engine.dataset_rows import DatasetRows
from glm_ms.engine.from_settings import build_tokenizer
from glm_ms.engine.process import restore_signal_handlers
from glm_ms.engine.run import set_device
from glm_ms.engine.weights import adapter_config, different_fields
from glm_ms.generation import GLMForCausalLM
from glm_ms.mindformers_api.generation import LENGTHS
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer, ChatPrompt
from glm_ms.settings import Problem, Settings, SettingsError, machine_problems
from glm_ms.settings.checks import check
from glm_ms.settings.schema import AUTO
from glm_ms.storage.errors import CheckpointError, DataError
from glm_ms.storage.suggest import did_you_mean
from glm_ms.tokenizer import SentencePieceTokenizer

PROMPT_COLUMN = "prompt"
# The Trainer and MindFormers' run scripts pass these with every prediction.
_IGNORED = ("image_processor", "audio_processor", "is_full_config", "adapter_id", "save_file", "task")
_TRAIN_FILE = "train_dataset.data_loader.dataset_dir"


def say(line: str) -> None:
    """Prints a line for the user to standard error, on the first rank, as `run_glm.py` does."""
    if get_real_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def refuse(given: dict[str, Any]) -> None:
    """Raises SettingsError for objects given to the Trainer whose choice is part of the YAML."""
    for name, value in given.items():
        if value is not None:
            raise SettingsError(
                f"Trainer({name}=...): not supported with glm_ms; the YAML determines optimizer, lr_schedule, "
                "runner_wrapper, eval_dataset and metric"
            )


def begin(settings: Settings, check_train_file: bool = True) -> SentencePieceTokenizer:
    """Checks a job as `run_glm.py` does, sets the device and builds the tokenizer.

    Adjusts the settings and prints each adjustment. `check_train_file` is False if the caller gives the training data.
    Raises SettingsError with all problems, or VocabularyError for an unusable file of the tokenizer.
    """
    problems = [problem for problem in check(settings) if check_train_file or problem.key != _TRAIN_FILE]
    if settings.use_parallel and not settings.is_training():
        message = f"True: {settings.run_mode} runs in one process; set False"
        problems.append(Problem("use_parallel", message, where=settings.where("use_parallel")))
    problems += machine_problems(settings)
    if problems:
        raise SettingsError(problems)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    restore_signal_handlers()
    set_device(settings)
    ms.set_seed(settings.seed)
    for note in settings.notes:
        say(note)
    return build_tokenizer(settings)


def take_checkpoint(config: MindFormerConfig) -> tuple[str | None, Any]:
    """Removes and returns the checkpoint (`finetune_checkpoint=` ...) and `resume_training=` of a call, or None.

    The Trainer stores both in its configuration, where they would also apply to its next calls.
    """
    path, resume = config.get("load_checkpoint") or None, config.get("resume_training")
    config.update(load_checkpoint=None, resume_training=None, checkpoint={}, use_legacy_format=True)
    return path, resume


def apply_checkpoint(settings: Settings, path: str | None, resume: Any) -> bool:
    """Replaces the checkpoint of the settings by that of a training call, as `take_checkpoint` returns it.

    Returns whether the call gives initial weights. Raises SettingsError if `resume` is not True or False.
    """
    if resume not in (None, True, False):
        raise SettingsError(
            f"resume_training = {resume!r}: must be True or False; give the checkpoint as resume_from_checkpoint"
        )
    if resume is not None:
        settings.resume_training = path or True if resume else False
    if path and not resume:
        settings.load_checkpoint = path
    return bool(path and not resume)


def check_network(network: MindFormersGLM, settings: Settings) -> None:
    """Raises SettingsError if a given model is another network than that of the YAML, or has a smaller seq_length."""
    core = network.core.config
    wanted = settings.model.model_config
    if wanted.padded_vocab_size == AUTO:
        wanted.padded_vocab_size = core.padded_vocab_size
    different = different_fields(settings.glm_config(), core, "the model")
    if core.seq_length < wanted.seq_length:
        different.append(f"model.model_config.seq_length: {wanted.seq_length}, in the model {core.seq_length}")
    if different:
        raise SettingsError(f"{settings.source} and the model given are different networks: {'; '.join(different)}")


def load_missing_weights(network: MindFormersGLM, settings: Settings) -> GLMForCausalLM:
    """Loads the weights and the adapter of the settings into a given model, unless it has them.

    Raises CheckpointError if they are unusable, or if the model has another adapter.
    """
    core = network.core
    if settings.load_checkpoint and settings.load_checkpoint != network.weights_from:
        network.load_weights(settings.load_checkpoint)
    say(f"weights: {network.weights_from or 'random'}")
    if settings.load_adapter and settings.load_adapter != network.adapter_from:
        if core.adapter is not None:
            raise CheckpointError(
                f"{settings.load_adapter}: the model given already has an adapter, from {network.adapter_from}"
            )
        say(str(core.load_adapter(settings.load_adapter)))
        network.adapter_from = settings.load_adapter
    return core


def plan_training(network: MindFormersGLM, settings: Settings, weights_given: bool) -> None:
    """Adapts the settings of a training to a given model; the model does not change.

    `load_checkpoint` becomes the path of the model's weights, unless the call gives others (`weights_given`). Raises
    CheckpointError for an adapter that the settings do not train.
    """
    check_network(network, settings)
    adapter_not_trained = network.core.adapter is not None and settings.model.pet_config.pet_type is None
    if settings.load_adapter or adapter_not_trained:
        raise CheckpointError(
            "Trainer(model=...): the model has an adapter or load_adapter names one; to continue training an adapter, "
            "give no model and set load_checkpoint and load_adapter in the YAML"
        )
    if not weights_given:
        settings.load_checkpoint = network.weights_from or settings.load_checkpoint
    if not settings.load_checkpoint:
        settings.model.init = "random"  # the caller wants the weights that the model has


def before_training(network: MindFormersGLM, settings: Settings) -> GLMForCausalLM:
    """A given model with the weights of the settings and, if they train one, an adapter."""
    if settings.resume_training is False:
        load_missing_weights(network, settings)
    adapter = adapter_config(settings)
    if adapter is not None and network.core.adapter is None:
        network.core.add_adapter(adapter, settings.seed)
    return network.core


def after_training(network: MindFormersGLM, settings: Settings) -> None:
    """Stores in a trained model the path of its new weights or adapter."""
    network.core.network.set_train(False)
    if settings.model.pet_config.pet_type is None:
        network.weights_from = settings.output_dir
    else:
        network.adapter_from = settings.output_dir


def rows_of(dataset: Any, settings: Settings) -> DatasetRows:
    """Rows of a given data set, which also determines batch size and order of the run; DataError if unusable."""
    if not isinstance(dataset, Dataset):
        raise DataError(
            "Trainer(train_dataset=...): expected the path of a file or a MindSpore data set, found "
            f"{type(dataset).__name__}"
        )
    rows = DatasetRows(dataset)
    longest = settings.model.model_config.seq_length
    if rows.seq_length > longest:
        raise DataError(
            f"train_dataset: rows of {rows.seq_length} tokens exceed model.model_config.seq_length = {longest}"
        )
    settings.runner_config.batch_size = rows.batch_size
    settings.train_dataset.data_loader.shuffle = False
    say("train_dataset: batch size and order are those of the data set, the same in every epoch")
    return rows


def set_tokenizer(settings: Settings, tokenizer: Any) -> None:
    """Replaces the tokenizer of the YAML by a given one, which must be one of glm_ms."""
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise SettingsError(
            f"Trainer(tokenizer=...): {type(tokenizer).__name__}: expected a tokenizer of glm_ms, as AutoTokenizer "
            "loads it from a GLM folder or YAML"
        )
    chosen = settings.processor.tokenizer
    chosen.type, chosen.vocab_file = type(tokenizer.core).__name__, tokenizer.vocab_file


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
            raise DataError("input_data: a text of build_prompt; give plain texts, predict builds the prompts")
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
