"""Data sets, files and folders of a run: keys of each data loader, row lengths against the network, what must exist."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from glm_ms.data.encoder import Columns
from glm_ms.data.formats import FORMATS
from glm_ms.data.prompts import ONLY_PROMPT_FILES, PROMPT_FILES, looks_like_data_file
from glm_ms.families import FAMILIES, encoder_of, family_of
from glm_ms.metrics import LOSS, METRICS, TEXT, takes
from glm_ms.settings.errors import Problem
from glm_ms.settings.schema import Settings, parts_in_use, unused_keys
from glm_ms.spelling import tool
from glm_ms.storage.errors import DataError
from glm_ms.storage.paths import exists, pattern_hint
from glm_ms.tokenizer.base import PLAIN

_SEQ_LENGTH, _TOKENIZER = "model.model_config.seq_length", "processor.tokenizer.type"
_TEMPLATE = "processor.tokenizer.template"
_MAX_LENGTH, _NEW_TOKENS = "eval_dataset.max_seq_length", "generation.max_new_tokens"
# `[gMASK] sop`, a role token and one token of text.
_SHORTEST_PROMPT = 4
_RECORD_ENDINGS = (".json", ".jsonl")
# Usual names of the files of each part, for a folder with several record files.
_PART_NAMES = {"train": ("train",), "eval": ("dev", "eval", "valid", "validation", "test")}


def settle_data(settings: Settings) -> None:
    """Replaces `max_seq_length: null` by the length of the network, if the data loader uses the key; notes unused keys.

    Those are no problems: a file for one data loader also serves another.
    """
    for data in (settings.train_dataset, settings.eval_dataset):
        if FORMATS[data.data_loader.type].uses_max_seq_length and data.max_seq_length is None:
            data.max_seq_length = settings.model.model_config.seq_length
    for part in parts_in_use(settings):
        data = settings.get(f"{part}_dataset")
        for name in FORMATS[data.data_loader.type].unused_keys:
            if attrgetter(name)(data) != attrgetter(name)(type(data)()):
                settings.notes.append(f"{part}_dataset.{name}: no effect with {data.data_loader.type}")


def loader_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of a data set ("train" or "eval") that concern neither the network nor generation."""
    section = f"{part}_dataset"
    data, family = settings.get(section), family_of(settings.processor.tokenizer.type)
    kind, name = data.data_loader.type, family.tokenizer.__name__
    template = settings.processor.tokenizer.template
    encoder = encoder_of(FORMATS[kind], family, template)
    if template == PLAIN and FORMATS[kind].encoder is not None:
        message = (
            f"{kind} has messages with roles, but {_TEMPLATE} is {template}; use ADGenDataLoader, or set it to chat"
        )
        yield Problem(f"{section}.data_loader.type", message, (_TEMPLATE,))
    elif encoder.needs_roles and not family.tokenizer.roles:
        usable = [item.tokenizer.__name__ for item in FAMILIES.values() if item.tokenizer.roles]
        message = f"{kind} needs {_TOKENIZER}: {' or '.join(usable)}, found {name}, which has no roles"
        yield Problem(f"{section}.data_loader.type", message, (_TOKENIZER,))
    elif not data.ignore_pad_token_for_loss and not encoder.learns_padding:
        message = f"False is not possible with {kind} and {name}; remove it"
        yield Problem(f"{section}.ignore_pad_token_for_loss", message, (_TOKENIZER,))
    yield from unused_keys(settings, section)
    try:
        Columns.of(data.data_loader)
    except DataError as error:
        yield Problem(f"{section}.data_loader.origin_columns", str(error))
    folder = settings.train_dataset.cache_dir if part == "train" else None
    if folder is not None:
        yield from _folder_problems("train_dataset.cache_dir", folder)


def length_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The lengths of a data set that do not fit the network or the generation, after `settle_data`."""
    data, seq_length = settings.get(f"{part}_dataset"), settings.model.model_config.seq_length
    tools = FORMATS[data.data_loader.type].uses_max_seq_length
    needed, fitting = data.max_source_length + data.max_target_length + 1, seq_length - data.max_source_length - 1
    if part == "eval":
        yield from _length_of_tool_answers(settings) if tools else _length_of_answers(settings)
    elif tools and data.max_seq_length != seq_length:
        advice = "set both to the same, or max_seq_length to null"
        message = f"{data.max_seq_length} must equal {_SEQ_LENGTH} = {seq_length}; {advice}"
        yield Problem("train_dataset.max_seq_length", message, (_SEQ_LENGTH,))
    elif not tools and seq_length != needed:
        source, target = "train_dataset.max_source_length", "train_dataset.max_target_length"
        message = (
            f"{seq_length} must equal {source} + {target} + 1 = {data.max_source_length} + {data.max_target_length} + 1"
            f" = {needed}; set {_SEQ_LENGTH} to {needed}{f', or {target} to {fitting}' if fitting > 0 else ''}"
        )
        yield Problem(_SEQ_LENGTH, message, (source, target))


def _length_of_answers(settings: Settings) -> Iterator[Problem]:
    data, seq_length, source = settings.eval_dataset, settings.get(_SEQ_LENGTH), "eval_dataset.max_source_length"
    needs = {
        LOSS: ("eval_dataset.max_target_length", data.max_target_length + 1, " + 1"),
        TEXT: (_NEW_TOKENS, settings.generation.max_new_tokens, ""),
    }
    for metric in settings.metric.type:
        if METRICS[metric].input == TEXT and settings.generation.max_length is not None:
            continue  # max_length, at most seq_length, ends every answer
        key, tokens, extra = needs[METRICS[metric].input]
        needed = data.max_source_length + tokens
        if needed > seq_length:
            message = (
                f"{seq_length} is less than {source} + {key}{extra} = {needed}, which {metric} needs; "
                f"set {_SEQ_LENGTH} to {needed}, or lower {source} or {key}"
            )
            yield Problem(_SEQ_LENGTH, message, (source, key, "metric.type"))


def _length_of_tool_answers(settings: Settings) -> Iterator[Problem]:
    """An answer whose prompt leaves no room is counted and left out; but there must be room for some prompt."""
    length, seq_length, tokens = (settings.get(key) for key in (_MAX_LENGTH, _SEQ_LENGTH, _NEW_TOKENS))
    generates = takes(TEXT, settings.metric.type) and settings.generation.max_length is None
    if length > seq_length:
        message = f"{length} is more than {_SEQ_LENGTH} = {seq_length}; lower it, or set it to null"
        yield Problem(_MAX_LENGTH, message, (_SEQ_LENGTH,))
    elif generates and length - tokens < _SHORTEST_PROMPT:
        message = (
            f"{tokens} leaves no room for a prompt within {_MAX_LENGTH} = {length}; lower it to at most "
            f"{max(length - _SHORTEST_PROMPT, 1)}, or raise {_MAX_LENGTH}"
        )
        yield Problem(_NEW_TOKENS, message, (_MAX_LENGTH, "metric.type"))


def file_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of files and folders of the run mode; folders of records are replaced by the file in them."""
    yield from _folder_problems("output_dir", settings.output_dir)
    yield from vocab_file_problems(settings)
    yield from _weights(settings)
    for part in parts_in_use(settings):
        yield from record_problems(settings, part)
    prompts = settings.predict_data
    is_file = "\n" not in prompts and Path(prompts).suffix.lower() in PROMPT_FILES
    if settings.run_mode == "predict" and is_file:
        yield from _missing("predict_data", prompts)
    elif settings.run_mode == "predict" and looks_like_data_file(prompts):
        yield Problem("predict_data", f"{prompts}: {ONLY_PROMPT_FILES}")


def _folder_problems(key: str, folder: str) -> Iterator[Problem]:
    path = Path(folder)
    blocked = next((item for item in (path, *path.parents) if exists(item) and not item.is_dir()), None)
    if blocked is not None:
        yield Problem(key, f"{blocked} is a file; give a folder, which is made if it does not exist")


def vocab_file_problems(settings: Settings) -> Iterator[Problem]:
    """The problems of the file of the tokenizer."""
    key, path = "processor.tokenizer.vocab_file", settings.processor.tokenizer.vocab_file
    advice = f"give the tokenizer.model of the weights, or train one with {tool('train_vocab')}"
    if not path:
        yield Problem(key, f"missing; {advice}")
    elif Path(path).is_dir():
        inside = Path(path, "tokenizer.model")
        yield Problem(key, f"{path} is a folder; give the file{f' {inside}' if inside.is_file() else ''}")
    elif not Path(path).is_file():
        yield Problem(key, f"{path}: no such file{pattern_hint(path) or f'; {advice}'}")


def record_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of the records of a part, "train" or "eval"; a folder is replaced by the file in it."""
    key, loader = f"{part}_dataset.data_loader.dataset_dir", settings.get(f"{part}_dataset.data_loader")
    path = Path(loader.dataset_dir)
    if not loader.dataset_dir:
        yield Problem(key, f"missing; give the file of records (--{part}_dataset PATH)")
    elif not exists(path):
        yield from _missing(key, loader.dataset_dir)
    elif path.is_dir():
        found = sorted(item for item in path.iterdir() if item.suffix in _RECORD_ENDINGS and item.is_file())
        named = [item for name in _PART_NAMES[part] for item in found if item.stem == name]
        if len(found) == 1 or named:
            loader.dataset_dir = str((named or found)[0])
            settings.notes.append(f"{key}: {path} is a folder, {loader.dataset_dir} is read")
        else:
            listing = ", ".join(item.name for item in found) or "none"
            yield Problem(key, f"{path}: which file is meant? .json and .jsonl files there: {listing}; name one")
    elif not path.is_file():
        yield Problem(key, f"{path}: not a regular file; give a file or folder of records")


def _weights(settings: Settings) -> Iterator[Problem]:
    resume = settings.resume_training if settings.is_training() else False
    named = {"load_checkpoint": settings.load_checkpoint, "load_adapter": settings.load_adapter}
    for key, path in {**named, "resume_training": resume if isinstance(resume, str) else ""}.items():
        if path:
            yield from _missing(key, path)
    if settings.load_checkpoint or resume:
        return
    if settings.run_mode == "train" or settings.model.init == "random":
        settings.notes.append("load_checkpoint: empty, so the weights are random")
    else:
        # A file of MindFormers may say run_mode: train for the same.
        what = "finetuning" if settings.is_training() else f"run_mode {settings.run_mode}"
        needs = f"missing; {what} needs initial weights"
        message = f"{needs}. Name them (--load_checkpoint PATH), or set model.init=random"
        yield Problem("load_checkpoint", message, ("model.init",))


def _missing(key: str, path: str) -> Iterator[Problem]:
    # OUTPUT_DIR/checkpoint/best means the checkpoint that best.json beside it names.
    best = Path(path).name == "best" and Path(path).with_name("best.json").is_file()
    if not best and not exists(path):
        yield Problem(key, f"{path}: no such file or folder (from {os.getcwd()}){pattern_hint(path)}")
