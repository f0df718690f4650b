"""What a data set looks like: tables, histograms and a picture of lengths, and records as they are trained."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.data.encoder import Encoder, Messages
from glm_ms.data.rows import IGNORED
from glm_ms.data.statistics import KINDS, MULTIPLE, LengthStatistics, quantile
from glm_ms.storage.atomic import replace_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from glm_ms.tokenizer import SentencePieceTokenizer

# Histograms in text: the length of a bar, the number of bins, and their widths.
_BAR_LENGTH, _MOST_BINS, _STEPS = 50, 20, (1, 2, 4, 8, 16, 32, 64)
_NAMES = {"prompt": "prompt (no loss)", "answer": "answer (loss)", "whole": "together"}
# The picture.
_TITLES = {
    "prompt": "Prompt: tokens without loss",
    "answer": "Answer: tokens with loss",
    "whole": "Prompt and answer together",
}
_BAR, _CUT, _LIMIT, _QUANTILE = "#4c78a8", "#e45756", "#b3201f", "#555555"
_MOST_BARS = 60
# Markers of lines: without loss; with loss; with the padding id as label.
SILENT, LOSS, PADDING_LABEL = "     | ", "LOSS | ", "PAD  | "
LEGEND = (
    "LOSS | has loss, PAD | has the padding id as label (ignore_pad_token_for_loss: False), other lines have no loss; "
    "⏎ is a line break in the text, </s> its end"
)
_GREEN, _NORMAL = "\x1b[32m", "\x1b[0m"


def summary_lines(statistics: LengthStatistics) -> Iterator[str]:
    """A table of the lengths, a row each for prompt, answer and both."""
    yield f"{'tokens':<18}{'min':>8}{'median':>8}{'p95':>8}{'p99':>8}{'max':>8}"
    for kind in KINDS:
        values = statistics.lengths(kind)
        shown = [values.min(), *(quantile(values, share) for share in (0.5, 0.95, 0.99)), values.max()]
        yield f"{_NAMES[kind]:<18}" + "".join(f"{int(value):>8,}" for value in shown)


def histogram_lines(statistics: LengthStatistics) -> Iterator[str]:
    """A histogram of the tokens of records, with the end of rows."""
    whole, end = statistics.whole, statistics.seq_length
    # A few very long records must not compress all others into one bar.
    top = min(int(whole.max()), 2 * max(quantile(whole, 0.99), end))
    # A power of 2, or a multiple of 64.
    step = next((step for step in _STEPS if top <= step * _MOST_BINS), -(-top // (_MOST_BINS * 64)) * 64)
    last = -(-top // step) - 1  # number of the last bin, which is open
    numbers = np.bincount(np.minimum((whole - 1) // step, last), minlength=last + 1)
    mark = f"{'':>15}{'':>9}  ----- seq_length {end} -----"
    for place in range(int(np.flatnonzero(numbers)[0]), last + 1):
        start, stop = place * step + 1, (place + 1) * step
        if start > end >= start - step:
            yield mark
        name = f"{start:,} and more" if place == last and whole.max() > stop else f"{start:,} - {stop:,}"
        number = int(numbers[place])
        bar = "█" * max(round(number / numbers.max() * _BAR_LENGTH), number > 0)
        yield f"{name:>15}{number:>9,}  {bar}".rstrip()
    if end > last * step:
        yield mark


def cut_lines(statistics: LengthStatistics) -> Iterator[str]:
    """Records that the configured lengths cut."""
    keys = ", ".join(f"{key} = {limit}" for key, limit in statistics.limits.values())
    yield f"cut at {keys} (rows of {statistics.seq_length}):"
    cut = statistics.cut()
    for name, number in zip(("prompt cut", "answer cut", "no label left", "anything cut"), cut.values()):
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


def marked_lines(encoder: Encoder, record: Messages, color: bool = False) -> Iterator[str]:
    """The lines of a record as it is trained, each with its marker; `color`: lines with loss in green."""
    input_ids, labels = encoder.train_ids(record)
    for marker, text in parts(encoder.tokenizer, input_ids, labels):
        lines = [_printable(line) for line in text.split("\n")]
        lines = [f"{line}⏎" for line in lines[:-1]] + [line for line in lines[-1:] if line]
        begin, end = (_GREEN, _NORMAL) if color and marker == LOSS else ("", "")
        yield from (f"{begin}{marker}{line}{end}" for line in lines)
    prompt, answer, kept_prompt, kept_answer = encoder.lengths(record)
    if prompt + answer > kept_prompt + kept_answer:
        yield f"       cut: {prompt - kept_prompt} tokens without and {answer - kept_answer} with loss"
    row = encoder.row(input_ids, labels)
    number = len(row["labels"]) - len(input_ids)
    if number:
        on_the_left = bool((row["attention_mask"] == 0).any())
        padding = row["labels"][:number] if on_the_left else row["labels"][-number:]
        loss = "without loss" if np.all(padding == IGNORED) else "WITH loss (ignore_pad_token_for_loss: False)"
        yield f"       padding: {number} tokens on the {'left' if on_the_left else 'right'}, {loss}"


def parts(
    tokenizer: SentencePieceTokenizer, input_ids: Sequence[int], labels: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """(marker, text) of each run of tokens with the same treatment; special tokens by name."""

    def kind(pair: tuple[int, int]) -> str:
        index, label = pair
        if label == IGNORED:
            return SILENT
        return LOSS if label == index else PADDING_LABEL

    for marker, run in groupby(zip(map(int, input_ids), map(int, labels)), kind):
        yield marker, spelled(tokenizer, [index for index, _ in run])


def spelled(tokenizer: SentencePieceTokenizer, ids: Sequence[int]) -> str:
    """Text of ids, with the names of special tokens, </s> and <unk>, which `decode` may omit."""
    names = {tokenizer.get_command(token): token for token in tokenizer.special_tokens}
    names.update({tokenizer.eos_token_id: tokenizer.eos_token, tokenizer.pad_token_id: tokenizer.pad_token})
    text = ""
    for name, group in groupby(ids, names.get):
        run = list(group)
        text += tokenizer.decode(run) if name is None else name * len(run)
    return text


def _printable(line: str) -> str:
    """Escapes control characters: a terminal must not obey the text of a record."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )


def write_length_plot(statistics: LengthStatistics, path: str | Path, title: str) -> None:
    """Writes histograms of prompt, answer and both as PNG; lengths beyond a limit are red.

    Args:
        path: of the picture, replaced if it exists; its folder is created if missing.

    Raises:
        OSError: the file cannot be written.
    """
    # Matplotlib takes half a second. Not pyplot: it keeps figures and changes the backend of the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), dpi=110, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
    for place, kind in enumerate(KINDS, start=1):
        _draw(figure.add_subplot(len(KINDS), 1, place), statistics, kind)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(Path(path), image.getvalue())


def _draw(axes: Axes, statistics: LengthStatistics, kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    values = statistics.lengths(kind)
    limits = {**statistics.limits, "whole": ("seq_length", statistics.seq_length)}
    name, limit = limits.get(kind, ("", None))
    # A few very long records must not compress all others.
    right = min(int(values.max()), int(1.5 * quantile(values, 0.99))) + 1
    right = max(right, int(1.08 * limit) if limit else 0)
    # Bars of equal width, one edge at the limit. A bar counts lengths above its first edge, up to its second.
    width = max(-(-right // _MOST_BARS), 1)
    edges = np.arange((0 if limit is None else limit % width) - width, right + width + 1, width)
    heights, _ = np.histogram(np.minimum(values, right), edges + 0.5)
    colors = [_BAR if limit is None or edge < limit else _CUT for edge in edges[:-1]]
    axes.bar(edges[:-1] + 0.5, heights, np.diff(edges), align="edge", linewidth=0.3, edgecolor="white", color=colors)
    for share, style in ((0.5, ":"), (0.99, "--")):
        place = quantile(values, share)
        label = f"{'median' if share == 0.5 else 'p99'} = {place:,}"
        axes.axvline(place, color=_QUANTILE, linestyle=style, linewidth=1.2, label=label)
    if limit is not None:
        longer = int((values > limit).sum())
        label = f"{name} = {limit:,} ({longer:,} longer, {longer / len(values):.1%})"
        axes.axvline(limit + 0.5, color=_LIMIT, linewidth=1.8, label=label)
    outside = int((values > right).sum())
    note = f"   ({outside:,} up to {int(values.max()):,} in the last bar)" if outside else ""
    axes.set_title(_TITLES[kind], loc="left", fontsize=11)
    axes.set_xlabel(f"tokens{note}")
    axes.set_ylabel("records")
    axes.set_xlim(0, edges[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the title: inside the axes it hides bars.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=3, frameon=False, fontsize=9, borderpad=0.2,
        columnspacing=1.4, handlelength=1.6
    )  # fmt: skip
