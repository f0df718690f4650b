"""Encoders and data sets of tests, by the arguments of a section."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from glm_ms.data.cache import CacheRequest
from glm_ms.data.datasets import EvalDataset, TrainDataset
from glm_ms.data.encoder import Columns, Encoder
from glm_ms.data.records import read_prompt_and_answer
from glm_ms.families import build_encoder
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.tokenizer import SentencePieceTokenizer

COLUMNS = ("content", "summary")


class Record(NamedTuple):
    prompt: str
    response: str
    history: tuple[tuple[str, str], ...]
    line: int


def read_messages(record: Any, columns: Sequence[str] = COLUMNS, **others: str) -> Any:
    """The messages of a record of prompt and answer; `others` are `history_column` ..."""
    return read_prompt_and_answer(record, "f:3", Columns.of(loader_section("ADGenDataLoader", columns, **others)))


def read_records(path: str | Path, columns: Sequence[str]) -> Iterator[Record]:
    """The records of a file of prompts and answers, by `read_prompt_and_answer`."""
    named = Columns.of(loader_section("ADGenDataLoader", columns))
    for raw in raw_values(path):
        messages = read_prompt_and_answer(parse_value(raw, Path(path)), f"{path}:{raw.line}", named)
        if messages is not None:
            *earlier, prompt, answer = (message.content for message in messages)
            yield Record(prompt, answer, tuple(zip(earlier[::2], earlier[1::2])), raw.line)


def loader_section(data_format: str, columns: Sequence[str], **keys: str) -> SimpleNamespace:
    """A `data_loader` section; `keys` are `history_column` ..."""
    others = {f"{kind}_column": None for kind in Columns._fields[2:]}
    return SimpleNamespace(type=data_format, origin_columns=columns, **{**others, **keys})


def encoder_of(
    data_format: str, tokenizer: SentencePieceTokenizer, max_prompt_length: int | None = None, **keys: Any
) -> Encoder:
    """The encoder of a format; `keys` are those of a section, `columns` its origin_columns."""
    named = {name: keys.pop(name) for name in list(keys) if name.endswith("_column")}
    loader = loader_section(data_format, keys.pop("columns", COLUMNS), **named)
    lengths = {"max_source_length": 64, "max_target_length": 128, "max_seq_length": None}
    section = SimpleNamespace(data_loader=loader, **{**lengths, "ignore_pad_token_for_loss": True, **keys})
    return build_encoder(section, tokenizer, max_prompt_length)


def adgen_encoder(tokenizer: SentencePieceTokenizer, columns: Sequence[str] = COLUMNS, **keys: Any) -> Encoder:
    return encoder_of("ADGenDataLoader", tokenizer, columns=columns, **keys)


def conversation_encoder(tokenizer: SentencePieceTokenizer, source: int, target: int) -> Encoder:
    return encoder_of("ConversationDataLoader", tokenizer, max_source_length=source, max_target_length=target)


def tool_encoder(tokenizer: SentencePieceTokenizer, length: int, max_prompt_length: int | None = None) -> Encoder:
    return encoder_of("ToolAlpacaDataLoader", tokenizer, max_prompt_length, max_seq_length=length)


def adgen_rows(
    path: str | Path,
    tokenizer: SentencePieceTokenizer,
    columns: Sequence[str] = COLUMNS,
    max_source_length: int = 64,
    max_target_length: int = 128,
    ignore_pad_token_for_loss: bool = True,
    num_samples: int | None = None,
    cache: CacheRequest | None = None,
    say: Callable[[str], None] | None = None,
    **others: str,
) -> TrainDataset:
    """`others` are `history_column` ..."""
    encoder = adgen_encoder(
        tokenizer, columns, max_source_length=max_source_length, max_target_length=max_target_length,
        ignore_pad_token_for_loss=ignore_pad_token_for_loss, **others
    )  # fmt: skip
    return TrainDataset(path, encoder, num_samples, cache, say)


def adgen_prompts(
    path: str | Path,
    tokenizer: SentencePieceTokenizer,
    columns: Sequence[str] = COLUMNS,
    max_source_length: int = 64,
    max_target_length: int = 128,
    num_samples: int | None = None,
) -> EvalDataset:
    keys = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    return EvalDataset(path, adgen_encoder(tokenizer, columns, **keys), num_samples)
