"""Map-style data sets over ADGEN files (keywords of a product -> advert) for training and for generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_ms.data import glm2, glm3
from glm_ms.data.records import DataError, Record, read_records
from glm_ms.data.rows import Row, check_length, row_length

if TYPE_CHECKING:
    from glm_ms.tokenizer import SentencePieceTokenizer

_PREPARATION = {2: glm2, 3: glm3}  # by the tokenizer's model_generation
# `[gMASK] sop` and one token of text.
_SHORTEST_ENCODED = 3


class AdgenDataset:
    """Training rows of a file, made when asked for.

    Args:
        path: JSON lines or a JSON array, see `read_records`.
        tokenizer: decides by its `model_generation` between ChatGLM2 and ChatGLM3 preparation.
        columns: prompt and response column, optionally a history column.
        max_source_length, max_target_length: ids; a row has their sum and one.
        ignore_pad_token_for_loss: see `glm2.train_row`; ChatGLM3 knows true only.
        num_samples: usable records at most, from the start of the file; all when None.

    Attributes:
        seq_length: ids in a row.
        skipped: records passed over because prompt or response is empty.
        without_labels: records passed over because their prompt fills the row: with nothing to predict they
            would make the mean loss of their batch undefined.

    Raises:
        DataError: a fault of the file or of a setting, or no usable record.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: SentencePieceTokenizer,
        columns: Sequence[str] = ("content", "summary"),
        max_source_length: int = 64,
        max_target_length: int = 128,
        ignore_pad_token_for_loss: bool = True,
        num_samples: int | None = None,
    ) -> None:
        check_length("max_source_length", max_source_length, _SHORTEST_ENCODED)
        check_length("max_target_length", max_target_length)
        self.path = Path(path)
        self.seq_length = row_length(max_source_length, max_target_length)
        self._tokenizer = tokenizer
        self._lengths = (max_source_length, max_target_length)
        self._ignore_pad = ignore_pad_token_for_loss

        has_labels = _PREPARATION[tokenizer.model_generation].has_labels

        def usable(record: Record) -> Record | None:
            return record if has_labels(tokenizer, record, *self._lengths) else None

        self._records, self.skipped, self.without_labels = _collect(path, columns, num_samples, usable)
        self[0]  # a setting that cannot be used shows now, not in the first step

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        """`input_ids`, `labels`, `attention_mask`, `position_ids`: int32 [seq_length] each."""
        record = self._records[index]
        train_row = _PREPARATION[self._tokenizer.model_generation].train_row
        return train_row(self._tokenizer, record, *self._lengths, self._ignore_pad)

    def describe(self) -> str:
        """One line: the file, its usable records and those passed over."""
        return _describe(self.path, len(self), self.skipped, self.without_labels)


class AdgenEvalDataset:
    """Prompts to generate from and the texts to compare with, as the release of each model prepares them.

    Args:
        path, tokenizer, columns, num_samples: as `AdgenDataset`.
        max_source_length: prompt ids at most.
        max_target_length: reference ids at most; the reference text is what they decode to.

    Attributes:
        skipped: records passed over because prompt or response is empty.
        blank: records passed over because their reference is white space: there is nothing to compare with.
        too_long: ChatGLM3 only: records passed over because their prompt has `max_source_length` ids or
            more; its release leaves them out of the evaluation. Raise max_source_length to keep them.

    Raises:
        DataError: a fault of the file or of a setting, or no usable record.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: SentencePieceTokenizer,
        columns: Sequence[str] = ("content", "summary"),
        max_source_length: int = 64,
        max_target_length: int = 128,
        num_samples: int | None = None,
    ) -> None:
        check_length("max_source_length", max_source_length, _SHORTEST_ENCODED)
        check_length("max_target_length", max_target_length, _SHORTEST_ENCODED)
        self.path = Path(path)
        self._tokenizer = tokenizer
        prepare = _PREPARATION[tokenizer.model_generation].eval_row

        def usable(record: Record) -> tuple[str, list[int], list[int]] | None:
            row = prepare(tokenizer, record, max_source_length, max_target_length)
            if row is not None and not tokenizer.decode(row[1]).strip():
                self.blank += 1
                return None
            return None if row is None else (record.prompt, *row)

        self.blank = 0
        self._rows, self.skipped, refused = _collect(path, columns, num_samples, usable)
        self.too_long = refused - self.blank

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` int32 [S], unpadded; `labels` int32 [T], the reference ids; `prompt` and `reference`,
        texts."""
        prompt, input_ids, labels = self._rows[index]
        return {
            "input_ids": np.array(input_ids, np.int32),
            "labels": np.array(labels, np.int32),
            "prompt": prompt,
            "reference": self._tokenizer.decode(labels).strip(),
        }

    def describe(self) -> str:
        """One line: the file, its usable records and those passed over."""
        return _describe(self.path, len(self), self.skipped + self.blank, self.too_long)


def _collect(
    path: str | Path,
    columns: Sequence[str],
    num_samples: int | None,
    usable: Callable[[Record], Any],
) -> tuple[list, int, int]:
    """What `usable` makes of up to `num_samples` records, records skipped as empty, records it refused."""
    if num_samples is not None and num_samples < 1:
        raise DataError(f"num_samples = {num_samples}: must be at least 1, or null for all records")
    reader = read_records(path, columns)
    items: list = []
    refused = 0
    for record in reader:
        item = usable(record)
        if item is None:
            refused += 1
        else:
            items.append(item)
        if len(items) == num_samples:
            break
    if not items:
        raise DataError(_describe(Path(path), 0, reader.skipped, refused))
    return items, reader.skipped, refused


def _describe(path: Path, used: int, empty: int, refused: int) -> str:
    parts = [f"{path}: {used} records used"]
    if empty:
        parts.append(f"{empty} skipped with an empty prompt or response")
    if refused:
        parts.append(f"{refused} skipped with a prompt longer than max_source_length allows for; raise it")
    return ", ".join(parts)
