"""`train_dataset` and `eval_dataset`: keys of each data loader, and row lengths against the network."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from glm_ms.data.formats import FORMATS
from glm_ms.families import FAMILIES, family_of
from glm_ms.metrics import LOSS, METRICS, TEXT, takes
from glm_ms.settings.errors import Problem
from glm_ms.settings.files import folder_problems
from glm_ms.settings.schema import Settings, unused_keys

_SEQ_LENGTH, _TOKENIZER = "model.model_config.seq_length", "processor.tokenizer.type"
_MAX_LENGTH, _NEW_TOKENS = "eval_dataset.max_seq_length", "generation.max_new_tokens"
# `[gMASK] sop`, a role token and one token of text.
_SHORTEST_PROMPT = 4


def fill_max_seq_length(settings: Settings) -> None:
    """Replaces `max_seq_length: null` by the length of the network, if the data loader uses the key."""
    for data in (settings.train_dataset, settings.eval_dataset):
        if FORMATS[data.data_loader.type].uses_max_seq_length and data.max_seq_length is None:
            data.max_seq_length = settings.model.model_config.seq_length


def data_notes(settings: Settings, part: str) -> Iterator[str]:
    """A line for every key without effect. These are no problems: a file for one data loader also serves another."""
    data = settings.get(f"{part}_dataset")
    for name in FORMATS[data.data_loader.type].unused_keys:
        if attrgetter(name)(data) != attrgetter(name)(type(data)()):
            yield f"{part}_dataset.{name}: no effect with {data.data_loader.type}"


def loader_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of a data set ("train" or "eval") that concern neither the network nor generation."""
    section = f"{part}_dataset"
    data, family = settings.get(section), family_of(settings.processor.tokenizer.type)
    kind, name, data_format = data.data_loader.type, family.tokenizer.__name__, FORMATS[data.data_loader.type]
    if data_format.needs_roles and not family.tokenizer.roles:
        usable = [item.tokenizer.__name__ for item in FAMILIES.values() if item.tokenizer.roles]
        message = f"{kind} needs {_TOKENIZER}: {' or '.join(usable)}, found {name}, which has no roles"
        yield Problem(f"{section}.data_loader.type", message, (_TOKENIZER,))
    elif not data.ignore_pad_token_for_loss and not (data_format.encoder or family.encoder).learns_padding:
        message = f"False is not possible with {kind} and {name}; remove it"
        yield Problem(f"{section}.ignore_pad_token_for_loss", message, (_TOKENIZER,))
    yield from unused_keys(settings, section)
    folder = settings.train_dataset.cache_dir if part == "train" else None
    if folder is not None and folder.strip():
        yield from folder_problems("train_dataset.cache_dir", folder)
    elif folder is not None:
        yield Problem("train_dataset.cache_dir", "empty; give a folder, or null for no cache")


def length_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The lengths of a data set that do not fit the network or the generation, after `fill_max_seq_length`."""
    data, seq_length = settings.get(f"{part}_dataset"), settings.model.model_config.seq_length
    tools = FORMATS[data.data_loader.type].uses_max_seq_length
    if part == "eval":
        yield from _length_of_tool_answers(settings) if tools else _length_of_answers(settings)
    elif tools and data.max_seq_length != seq_length:
        message = (
            f"{data.max_seq_length} must equal {_SEQ_LENGTH} = {seq_length}; set both to the same, or "
            "max_seq_length to null"
        )
        yield Problem("train_dataset.max_seq_length", message, (_SEQ_LENGTH,))
    elif not tools and seq_length != data.max_source_length + data.max_target_length + 1:
        source, target = "train_dataset.max_source_length", "train_dataset.max_target_length"
        needed, fitting = (
            data.max_source_length + data.max_target_length + 1,
            seq_length - data.max_source_length - 1,
        )
        message = (
            f"{seq_length} must equal {source} + {target} + 1 = {data.max_source_length} + {data.max_target_length} + 1"
            f" = {needed}; set {_SEQ_LENGTH} to {needed}{f', or {target} to {fitting}' if fitting > 0 else ''}"
        )
        yield Problem(_SEQ_LENGTH, message, (source, target))


def _length_of_answers(settings: Settings) -> Iterator[Problem]:
    data, seq_length, source = (
        settings.eval_dataset,
        settings.get(_SEQ_LENGTH),
        "eval_dataset.max_source_length",
    )
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
