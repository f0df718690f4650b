"""Lengths of the records of a file, what the configured lengths cut, and which lengths would cut less."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_ms.data.encoder import Encoder
from glm_ms.data.records import no_records
from glm_ms.data.workers import check_may_start, map_batches, processes_for
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import JsonFile, RawValue

# The matrix units (Cube of Ascend, tensor cores) compute blocks of 16 x 16: 178 tokens take 12 blocks, as 192 do.
MULTIPLE = 16
KINDS = ("prompt", "answer", "whole")


class _Measured(NamedTuple):
    """Lengths of the records of a batch, int32 [records, 4], see `Lengths`; records skipped as empty; errors."""

    lengths: np.ndarray
    skipped: int
    bad: list[DataError]


def _measure(encoder: Encoder, path: Path, skip_bad: bool, batch: list[RawValue]) -> _Measured:
    """Without `skip_bad` stops at the first value that is not a record."""
    lengths, skipped, bad = array("i"), 0, []
    for raw in batch:
        try:
            record = encoder.read_raw(raw, path)
        except DataError as error:
            bad.append(error)
            if not skip_bad:
                break
            continue
        if record is None:
            skipped += 1
        else:
            lengths.extend(encoder.lengths(record))
    return _Measured(np.array(lengths, np.int32).reshape(-1, 4), skipped, bad)


@dataclass
class LengthStatistics:
    """Lengths of all records of a file, in tokens.

    Attributes:
        prompt, answer: int32 [records], tokens without and with loss, before cutting.
        kept_prompt, kept_answer: those that remain in the row.
        seq_length: tokens of a row.
        limits: see `Encoder.limits`.
        skipped: records skipped as empty.
        bad: errors of the values that are not records.
    """

    prompt: np.ndarray
    answer: np.ndarray
    kept_prompt: np.ndarray
    kept_answer: np.ndarray
    seq_length: int
    limits: Mapping[str, tuple[str, int]]
    skipped: int = 0
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def whole(self) -> np.ndarray:
        """Prompt and answer together."""
        return self.prompt + self.answer

    def lengths(self, kind: str) -> np.ndarray:
        """int32 [records] for one of KINDS."""
        return getattr(self, kind)

    def cut(self) -> dict[str, int]:
        """Number of records that lose "prompt", "answer", "all labels" (these make no row), or "anything"."""
        prompt, answer = self.kept_prompt < self.prompt, self.kept_answer < self.answer
        return {
            "prompt": int(prompt.sum()),
            "answer": int(answer.sum()),
            "all labels": int((self.kept_answer == 0).sum()),
            "anything": int((prompt | answer).sum()),
        }

    def padding_share(self) -> float:
        """Share of padding in the rows that have labels."""
        used = self.kept_answer > 0
        if not used.any():
            return 0.0
        return 1 - float((self.kept_prompt + self.kept_answer)[used].mean()) / self.seq_length

    def fitting(self, share: float) -> tuple[int, int]:
        """The smallest row that cuts nothing of a share of the records: its length, a multiple of MULTIPLE, and the
        tokens for the prompt."""
        if "prompt" in self.limits:
            prompt, answer = _smallest_pair(self.prompt, self.answer, share)
            return _round_up(prompt + answer), prompt
        whole = _round_up(quantile(self.whole, share))
        return whole, quantile(self.prompt, share)


def quantile(values: np.ndarray, share: float) -> int:
    """The smallest value that at least a share of the values does not exceed."""
    return int(np.partition(values, _rank(len(values), share))[_rank(len(values), share)])


def measure(
    path: str | Path, encoder: Encoder, num_samples: int | None = None, num_workers: int = 1, skip_bad: bool = False
) -> LengthStatistics:
    """Measures the records of a file, as many as training reads.

    Args:
        path, encoder, num_samples: as in `TrainDataset`.
        num_workers: processes for a large file.
        skip_bad: list values that are not records, and continue.

    Raises:
        DataError: the file cannot be read or has no record to measure; without `skip_bad`, a value is not a record.
    """
    file = JsonFile(path)
    num_processes = processes_for(file.num_bytes, num_workers)
    if num_processes > 1:
        check_may_start()
    parts, skipped, usable = [], 0, 0
    bad: list[str] = []
    work = functools.partial(_measure, encoder, file.path, skip_bad)
    results = map_batches(work, file.raw_values(), num_processes)
    for part in results:
        lengths = part.lengths
        if num_samples is not None:
            ends = np.flatnonzero(lengths[:, 3] > 0)
            if usable + len(ends) >= num_samples:
                parts.append(lengths[: ends[num_samples - usable - 1] + 1])
                results.close()
                break
            usable += len(ends)
        parts.append(lengths)
        skipped += part.skipped
        bad += map(str, part.bad)
        if part.bad and not skip_bad:
            raise part.bad[0]
    if not sum(map(len, parts)):
        nothing = f"{path}: no record to measure; {skipped} are empty, {len(bad)} are malformed"
        raise DataError(nothing) if skipped or bad else no_records(file.path)
    prompt, answer, kept_prompt, kept_answer = np.ascontiguousarray(np.concatenate(parts).T)
    return LengthStatistics(
        prompt, answer, kept_prompt, kept_answer, encoder.seq_length, encoder.limits(), skipped, bad
    )


def _smallest_pair(prompt: np.ndarray, answer: np.ndarray, share: float) -> tuple[int, int]:
    """Limits of prompt and answer with the smallest sum that cut nothing of a share of the records."""
    needed = _rank(len(prompt), share) + 1
    ordered = np.sort(prompt)
    best: tuple[int, int] | None = None
    for limit in np.unique(ordered[needed - 1 :]).tolist():
        within = answer[prompt <= limit]
        pair = (limit, int(np.partition(within, needed - 1)[needed - 1]))
        if best is None or sum(pair) < sum(best):
            best = pair
    assert best is not None
    return best


def _rank(number: int, share: float) -> int:
    """Index of the last of a share of sorted values."""
    return max(int(np.ceil(number * share - 1e-9)) - 1, 0)


def _round_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
