"""Lines of text about `LengthStatistics`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from glm_ms.data.encoder import Encoder
from glm_ms.data.statistics import KINDS, MULTIPLE, LengthStatistics, quantile

_BAR = 50
_MOST_BINS = 20
_STEPS = (1, 2, 4, 8, 16, 32, 64)
_NAMES = {"prompt": "prompt (no loss)", "answer": "answer (loss)", "whole": "together"}


def summary_lines(statistics: LengthStatistics) -> Iterator[str]:
    """A table of the lengths, a row each for prompt, answer and both."""
    yield f"{'tokens':<18}{'min':>8}{'median':>8}{'p95':>8}{'p99':>8}{'max':>8}"
    for kind in KINDS:
        values = statistics.lengths(kind)
        shown = [
            int(values.min()),
            *(quantile(values, share) for share in (0.5, 0.95, 0.99)),
            int(values.max()),
        ]
        yield f"{_NAMES[kind]:<18}" + "".join(f"{value:>8,}" for value in shown)


def histogram_lines(statistics: LengthStatistics) -> Iterator[str]:
    """A histogram of the tokens of records, with the end of rows."""
    whole, end = statistics.whole, statistics.seq_length
    # A few very long records must not compress all others into one bar.
    top = min(int(whole.max()), 2 * max(quantile(whole, 0.99), end))
    step = _step(top)
    last = -(-top // step) - 1  # number of the last bin, which is open
    numbers = np.bincount(np.minimum((whole - 1) // step, last), minlength=last + 1)
    mark = f"{'':>15}{'':>9}  ----- seq_length {end} -----"
    for place in range(int(np.flatnonzero(numbers)[0]), last + 1):
        start, stop = place * step + 1, (place + 1) * step
        if start > end >= start - step:
            yield mark
        name = f"{start:,} and more" if place == last and whole.max() > stop else f"{start:,} - {stop:,}"
        number = int(numbers[place])
        bar = "█" * max(round(number / numbers.max() * _BAR), number > 0)
        yield f"{name:>15}{number:>9,}  {bar}".rstrip()
    if end > last * step:
        yield mark


def _step(top: int) -> int:
    """Width of a bin: a power of 2, or a multiple of 64."""
    return next((step for step in _STEPS if top <= step * _MOST_BINS), -(-top // (_MOST_BINS * 64)) * 64)


def cut_lines(statistics: LengthStatistics) -> Iterator[str]:
    """Records that the configured lengths cut."""
    keys = ", ".join(f"{key} = {limit}" for key, limit in statistics.limits.values())
    yield f"cut at {keys} (rows of {statistics.seq_length}):"
    cut = statistics.cut()
    rows = {
        "prompt cut": cut["prompt"],
        "answer cut": cut["answer"],
        "no label left": cut["all labels"],
        "anything cut": cut["anything"],
    }
    for name, number in rows.items():
        yield f"  {name:<16}{number:>9,}  {number / len(statistics):>7.2%}"
    if cut["all labels"]:
        yield "  training skips records without a label"
    yield f"  {'padding in rows':<16}{'':>9}  {statistics.padding_share():>7.2%}"


def advice_lines(statistics: LengthStatistics, encoder: Encoder, part: str) -> Iterator[str]:
    """Lengths that cut nothing, and that cut nothing of 99 % of the records.

    Args:
        part: "train" or "eval", for the names of the keys.
    """
    yield (
        f"best seq_length, in multiples of {MULTIPLE} (matrix units compute in blocks of {MULTIPLE}, so the tokens up "
        "to the next multiple cost nothing):"
    )
    for name, share in (("cuts nothing", 1.0), ("99 % whole", 0.99)):
        seq_length, prompt = statistics.fitting(share)
        keys = encoder.length_keys(seq_length, prompt)
        values = " ".join(f"{part}_dataset.{key}={value}" for key, value in keys.items())
        yield f"  {name:<14}{seq_length:>6}   model.model_config.seq_length={seq_length} {values}"
