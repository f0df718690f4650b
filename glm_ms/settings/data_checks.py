"""`train_dataset` and `eval_dataset`: keys of each data loader, and lengths against the network's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Union

from glm_ms.metrics import LOSS, METRICS, TEXT, takes
from glm_ms.settings.schema import Settings
from glm_ms.settings.sections import EvalDatasetSettings, TrainDatasetSettings

Problem = tuple[str, str, tuple[str, ...]]
Section = Union[TrainDatasetSettings, EvalDatasetSettings]

_SEQ_LENGTH = "model.model_config.seq_length"
_TOKENIZER = "processor.tokenizer.type"
_CHAT_LOADERS = ("ConversationDataLoader", "ToolAlpacaDataLoader")
_TOOL_LOADER = "ToolAlpacaDataLoader"
# `[gMASK] sop`, a role token and one token of text.
_SHORTEST_PROMPT = 4


def parts_in_use(settings: Settings) -> tuple[str, ...]:
    """Which of "train" and "eval" the run reads."""
    train, evaluate = settings.is_training(), settings.run_mode == "eval"
    return ("train",) * train + ("eval",) * (evaluate or (train and settings.do_eval))


def fill_max_seq_length(settings: Settings) -> None:
    """Gives `max_seq_length: null` its meaning, the length of the network, where it has one."""
    for data in (settings.train_dataset, settings.eval_dataset):
        if data.data_loader.type == _TOOL_LOADER and data.max_seq_length is None:
            data.max_seq_length = settings.model.model_config.seq_length


def data_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """(key, what is wrong with it, other keys it depends on) for each problem of a data set.

    Args:
        settings: after `fill_max_seq_length`.
        part: "train" or "eval".
    """
    yield from loader_problems(settings, part)
    yield from _training_length(settings) if part == "train" else _evaluation_length(settings)


def loader_problems(settings: Settings, part: str) -> Iterator[Problem]:
    """The problems of a data set that concern neither the network nor generation."""
    section, data = f"{part}_dataset", _section(settings, part)
    kind, loader = data.data_loader.type, f"{section}.data_loader.type"
    tokenizer = settings.processor.tokenizer.type
    if kind in _CHAT_LOADERS and tokenizer != "ChatGLM3Tokenizer":
        message = f"{kind} needs {_TOKENIZER}: ChatGLM3Tokenizer, found {tokenizer}, which knows no roles"
        yield loader, message, (_TOKENIZER,)
    if not data.ignore_pad_token_for_loss and tokenizer == "ChatGLM3Tokenizer":
        message = "False is a setting of ChatGLM2; remove it for ChatGLM3"
        yield f"{section}.ignore_pad_token_for_loss", message, (_TOKENIZER,)
    if data.max_seq_length is not None and kind != _TOOL_LOADER:
        message = (
            f"has no effect with {kind}, whose rows have max_source_length + max_target_length + 1 tokens; "
            f"remove it, or use {_TOOL_LOADER}"
        )
        yield f"{section}.max_seq_length", message, (loader,)
    if isinstance(data, TrainDatasetSettings) and data.cache_dir is not None:
        yield from _cache_dir(data.cache_dir)


def data_notes(settings: Settings, part: str) -> Iterator[str]:
    """Lines for the user about keys without effect: a file for one data loader also serves with another one."""
    data = _section(settings, part)
    idle = {"ConversationDataLoader": ("origin_columns",)}.get(data.data_loader.type, ())
    if data.data_loader.type == _TOOL_LOADER:
        idle = ("origin_columns", "max_source_length", "max_target_length")
    default = type(data)()
    for name in idle:
        holder, usual = (
            (data.data_loader, default.data_loader) if name == "origin_columns" else (data, default)
        )
        if getattr(holder, name) != getattr(usual, name):
            key = "data_loader.origin_columns" if name == "origin_columns" else name
            yield f"{part}_dataset.{key}: no effect with {data.data_loader.type}"


def seq_length_problem(seq_length: int, max_source_length: int, max_target_length: int) -> str | None:
    """Why training rows do not fit the network, with the values that would; None if they do.

    Args:
        seq_length: `model.model_config.seq_length`, tokens.
        max_source_length: `train_dataset.max_source_length`, tokens.
        max_target_length: `train_dataset.max_target_length`, tokens.
    """
    needed = max_source_length + max_target_length + 1
    if seq_length == needed:
        return None
    message = (
        f"{_SEQ_LENGTH} = {seq_length} must equal train_dataset.max_source_length + "
        f"train_dataset.max_target_length + 1 = {max_source_length} + {max_target_length} + 1 = {needed}; "
        f"set {_SEQ_LENGTH} to {needed}"
    )
    fitting = seq_length - max_source_length - 1
    return f"{message}, or train_dataset.max_target_length to {fitting}" if fitting > 0 else message


def _section(settings: Settings, part: str) -> Section:
    return settings.train_dataset if part == "train" else settings.eval_dataset


def _cache_dir(cache_dir: str) -> Iterator[Problem]:
    key, path = "train_dataset.cache_dir", Path(cache_dir)
    if not cache_dir.strip():
        yield key, "empty; give a folder, or null for no cache", ()
        return
    blocked = next((item for item in (path, *path.parents) if item.exists() and not item.is_dir()), None)
    if blocked is not None:
        yield key, f"{blocked} is a file; give a folder, which is made if it is not there", ()


def _training_length(settings: Settings) -> Iterator[Problem]:
    data, seq_length = settings.train_dataset, settings.model.model_config.seq_length
    if data.data_loader.type == _TOOL_LOADER:
        if data.max_seq_length != seq_length:
            message = (
                f"{data.max_seq_length} must equal {_SEQ_LENGTH} = {seq_length}; set both to the same, or "
                "max_seq_length to null"
            )
            yield "train_dataset.max_seq_length", message, (_SEQ_LENGTH,)
        return
    problem = seq_length_problem(seq_length, data.max_source_length, data.max_target_length)
    if problem:
        keys = ("train_dataset.max_source_length", "train_dataset.max_target_length")
        yield _SEQ_LENGTH, problem.removeprefix(f"{_SEQ_LENGTH} = "), keys


def _evaluation_length(settings: Settings) -> Iterator[Problem]:
    data, seq_length = settings.eval_dataset, settings.model.model_config.seq_length
    if data.data_loader.type == _TOOL_LOADER:
        yield from _evaluation_length_of_tools(settings)
        return
    source = "eval_dataset.max_source_length"
    needs = {
        LOSS: ("eval_dataset.max_target_length", data.max_target_length + 1, " + 1"),
        TEXT: ("generation.max_new_tokens", settings.generation.max_new_tokens, ""),
    }
    for metric in settings.metric.type:
        key, tokens, extra = needs[METRICS[metric].input]
        needed = data.max_source_length + tokens
        if METRICS[metric].input == TEXT and settings.generation.max_length is not None:
            continue  # which is at most seq_length, and ends every answer
        if needed > seq_length:
            message = (
                f"{seq_length} is less than {source} + {key}{extra} = {needed}, which {metric} needs; "
                f"set {_SEQ_LENGTH} to {needed}, or lower {source} or {key}"
            )
            yield _SEQ_LENGTH, message, (source, key, "metric.type")


def _evaluation_length_of_tools(settings: Settings) -> Iterator[Problem]:
    """Answers whose prompt leaves no room are counted and left out; but some prompts must be able to."""
    key, new_tokens = "eval_dataset.max_seq_length", "generation.max_new_tokens"
    length, seq_length = settings.eval_dataset.max_seq_length, settings.model.model_config.seq_length
    if length is None:
        return
    if length > seq_length:
        yield key, f"{length} is more than {_SEQ_LENGTH} = {seq_length}; lower it, or set it to null", (
            _SEQ_LENGTH,
        )  # fmt: skip
        return
    generation = settings.generation
    counts = takes(TEXT, settings.metric.type) and generation.max_length is None
    if counts and length - generation.max_new_tokens < _SHORTEST_PROMPT:
        message = (
            f"{generation.max_new_tokens} leaves no room for a prompt within {key} = {length}; lower it to at most "
            f"{max(length - _SHORTEST_PROMPT, 1)}, or raise the latter"
        )
        yield new_tokens, message, (key, "metric.type")
