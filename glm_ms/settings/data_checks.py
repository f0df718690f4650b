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
from glm_ms.settings.sections import EvalDatasetSettings, TrainDatasetSettings

_SEQ_LENGTH = "model.model_config.seq_length"
_TOKENIZER = "processor.tokenizer.type"
# `[gMASK] sop`, a role token and one token of text.
_SHORTEST_PROMPT = 4


def fill_max_seq_length(settings: Settings) -> None:
    """Replaces `max_seq_length: null` by the length of the network, if the data loader uses the key."""
    for data in (settings.train_dataset, settings.eval_dataset):
        if FORMATS[data.data_loader.type].uses_max_seq_length and data.max_seq_length is None:
            data.max_seq_length = settings.model.model_config.seq_length


def data_notes(settings: Settings, part: str) -> Iterator[str]:
    """A line for every key without effect. These are no problems: a file for one data loader also serves another."""
    data = _section(settings, part)
    default = type(data)()
    for name in FORMATS[data.data_loader.type].unused_keys:
        if attrgetter(name)(data) != attrgetter(name)(default):
            yield f"{part}_dataset.{name}: no effect with {data.data_loader.type}"


def data_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of a data set, after `fill_max_seq_length`.

    Args:
        settings: of the run.
        part: "train" or "eval".
    """
    yield from loader_problems(settings, part)
    yield from length_problems(settings, part)


def loader_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of a data set that concern neither the network nor generation."""
    section, data = f"{part}_dataset", _section(settings, part)
    kind, loader = data.data_loader.type, f"{section}.data_loader.type"
    data_format, family = FORMATS[kind], family_of(settings.processor.tokenizer.type)
    name, encoder = family.tokenizer.__name__, data_format.encoder or family.encoder
    if data_format.needs_roles and not family.tokenizer.roles:
        usable = [item.tokenizer.__name__ for item in FAMILIES.values() if item.tokenizer.roles]
        message = f"{kind} needs {_TOKENIZER}: {' or '.join(usable)}, found {name}, which has no roles"
        yield Problem(loader, message, (_TOKENIZER,))
    elif not data.ignore_pad_token_for_loss and not encoder.learns_padding:
        message = f"False is not possible with {kind} and {name}; remove it"
        yield Problem(f"{section}.ignore_pad_token_for_loss", message, (_TOKENIZER,))
    yield from unused_keys(settings, section)
    if isinstance(data, TrainDatasetSettings) and data.cache_dir is not None:
        key = "train_dataset.cache_dir"
        if data.cache_dir.strip():
            yield from folder_problems(key, data.cache_dir)
        else:
            yield Problem(key, "empty; give a folder, or null for no cache")


def length_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The lengths of a data set that do not fit the network or the generation."""
    data, seq_length = _section(settings, part), settings.model.model_config.seq_length
    tools = FORMATS[data.data_loader.type].uses_max_seq_length
    if isinstance(data, EvalDatasetSettings):
        yield from _length_of_tool_answers(settings) if tools else _length_of_answers(settings)
    elif tools and data.max_seq_length != seq_length:
        message = (
            f"{data.max_seq_length} must equal {_SEQ_LENGTH} = {seq_length}; set both to the same, or "
            "max_seq_length to null"
        )
        yield Problem("train_dataset.max_seq_length", message, (_SEQ_LENGTH,))
    elif not tools:
        yield from _length_of_rows(data, seq_length)


def _length_of_rows(data: TrainDatasetSettings, seq_length: int) -> Iterator[Problem]:
    source, target = "train_dataset.max_source_length", "train_dataset.max_target_length"
    needed = data.max_source_length + data.max_target_length + 1
    if seq_length != needed:
        message = (
            f"{seq_length} must equal {source} + {target} + 1 = {data.max_source_length} + {data.max_target_length} + 1"
            f" = {needed}; set {_SEQ_LENGTH} to {needed}"
        )
        fitting = seq_length - data.max_source_length - 1
        more = f", or {target} to {fitting}" if fitting > 0 else ""
        yield Problem(_SEQ_LENGTH, message + more, (source, target))


def _section(settings: Settings, part: str) -> TrainDatasetSettings | EvalDatasetSettings:
    return settings.train_dataset if part == "train" else settings.eval_dataset


def _length_of_answers(settings: Settings) -> Iterator[Problem]:
    data, seq_length = settings.eval_dataset, settings.model.model_config.seq_length
    source = "eval_dataset.max_source_length"
    needs = {
        LOSS: ("eval_dataset.max_target_length", data.max_target_length + 1, " + 1"),
        TEXT: ("generation.max_new_tokens", settings.generation.max_new_tokens, ""),
    }
    for metric in settings.metric.type:
        key, tokens, extra = needs[METRICS[metric].input]
        needed = data.max_source_length + tokens
        if METRICS[metric].input == TEXT and settings.generation.max_length is not None:
            continue  # max_length, at most seq_length, ends every answer
        if needed > seq_length:
            message = (
                f"{seq_length} is less than {source} + {key}{extra} = {needed}, which {metric} needs; "
                f"set {_SEQ_LENGTH} to {needed}, or lower {source} or {key}"
            )
            yield Problem(_SEQ_LENGTH, message, (source, key, "metric.type"))


def _length_of_tool_answers(settings: Settings) -> Iterator[Problem]:
    """An answer whose prompt leaves no room is counted and left out; but there must be room for some prompt."""
    key, new_tokens = "eval_dataset.max_seq_length", settings.generation.max_new_tokens
    length, seq_length = settings.eval_dataset.max_seq_length, settings.model.model_config.seq_length
    generates = takes(TEXT, settings.metric.type) and settings.generation.max_length is None
    if length is not None and length > seq_length:
        message = f"{length} is more than {_SEQ_LENGTH} = {seq_length}; lower it, or set it to null"
        yield Problem(key, message, (_SEQ_LENGTH,))
    elif length is not None and generates and length - new_tokens < _SHORTEST_PROMPT:
        message = (
            f"{new_tokens} leaves no room for a prompt within {key} = {length}; lower it to at most "
            f"{max(length - _SHORTEST_PROMPT, 1)}, or raise {key}"
        )
        yield Problem("generation.max_new_tokens", message, (key, "metric.type"))
