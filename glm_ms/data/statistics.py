"""Lengths of the records of a file, what the configured lengths cut, and which lengths would cut less."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from glm_ms.data.encoder import Encoder, Lengths
from glm_ms.data.records import no_records
from glm_ms.data.workers import map_values, processes_for
from glm_ms.storage.errors import DataError
from glm_ms.storage.json_lines import JsonFile, RawValue

# The matrix units (Cube of Ascend, tensor cores) compute blocks of 16 x 16: 178 tokens take 12 blocks, as 192 do.
MULTIPLE = 16
KINDS = ("prompt", "answer", "whole")


@dataclass
class LengthStatistics:
    """Lengths of all records of a file, in tokens, int32 [records] each; see `Lengths`."""

    prompt: np.ndarray
    answer: np.ndarray
    kept_prompt: np.ndarray
    kept_answer: np.ndarray
    seq_length: int
    limits: Mapping[str, tuple[str, int]]  # see `Encoder.limits`
    skipped: int = 0  # empty records
    bad: list[str] = field(default_factory=list)  # errors of the values that are not records
    left_out: set[str] = field(default_factory=set)  # names of what has no effect, see `DataFormat`

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
        masks = {"prompt": prompt, "answer": answer, "all labels": self.kept_answer == 0, "anything": prompt | answer}
        return {name: int(mask.sum()) for name, mask in masks.items()}

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
        return _round_up(quantile(self.whole, share)), quantile(self.prompt, share)


def quantile(values: np.ndarray, share: float) -> int:
    """The smallest value that at least a share of the values does not exceed."""
    rank = _rank(len(values), share)
    return int(np.partition(values, rank)[rank])


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
    work = functools.partial(_measured, encoder, file.path, skip_bad)
    found = array("i")  # the four lengths of each record, one after the other
    bad: list[str] = []
    left_out: set[str] = set()
    skipped = usable = 0
    with closing(map_values(work, file.raw_values(), processes_for(file.num_bytes, num_workers))) as results:
        for lengths, names in results:
            left_out |= names
            if lengths is None:
                skipped += 1
            elif isinstance(lengths, str):
                bad.append(lengths)
            else:
                found.extend(lengths)
                usable += lengths.kept_answer > 0
                if usable == num_samples:
                    break
    if not found:
        nothing = f"{path}: no record to measure; {skipped} are empty, {len(bad)} are malformed"
        raise DataError(nothing) if skipped or bad else no_records(file.path)
    prompt, answer, kept_prompt, kept_answer = np.ascontiguousarray(np.array(found, np.int32).reshape(-1, 4).T)
    return LengthStatistics(
        prompt, answer, kept_prompt, kept_answer, encoder.seq_length, encoder.limits(), skipped, bad, left_out
    )


def _measured(encoder: Encoder, path: Path, skip_bad: bool, raw: RawValue) -> tuple[Lengths | str | None, set[str]]:
    """Lengths of a record, None for an empty one, the error of a value that is not a record; what is left out."""
    left_out: set[str] = set()
    try:
        record = encoder.read_raw(raw, path, left_out)
    except DataError as error:
        if not skip_bad:
            raise
        return str(error), left_out
    return None if record is None else encoder.lengths(record), left_out


def _smallest_pair(prompt: np.ndarray, answer: np.ndarray, share: float) -> tuple[int, int]:
    """Limits of prompt and answer with the smallest sum that cut nothing of a share of the records."""
    rank = _rank(len(prompt), share)
    pairs = []
    for limit in np.unique(np.sort(prompt)[rank:]).tolist():
        within = answer[prompt <= limit]
        pairs.append((limit, int(np.partition(within, rank)[rank])))
    return min(pairs, key=sum)


def _rank(number: int, share: float) -> int:
    """Index of the last of a share of sorted values."""
    return max(int(np.ceil(number * share - 1e-9)) - 1, 0)


def _round_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
