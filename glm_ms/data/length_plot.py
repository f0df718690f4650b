"""Histograms of `LengthStatistics`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.data.statistics import KINDS, LengthStatistics, quantile
from glm_ms.storage.atomic import replace_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "prompt": "Prompt: tokens without loss",
    "answer": "Answer: tokens with loss",
    "whole": "Prompt and answer together",
}
_BAR, _CUT, _LIMIT, _QUANTILE = "#4c78a8", "#e45756", "#b3201f", "#555555"
_MOST_BARS = 60


def write_length_plot(statistics: LengthStatistics, path: str | Path, title: str) -> None:
    """Writes histograms of prompt, answer and both as PNG; lengths beyond a limit are red.

    Args:
        statistics: of a file.
        path: of the picture, replaced if it exists; its folder is created if missing.
        title: of the picture.

    Raises:
        OSError: the file cannot be written.
    """
    # Not pyplot: it keeps figures and changes the backend of the process.
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
    right = max(_right_end(values), int(1.08 * limit) if limit else 0)
    edges = _edges(right, limit)
    heights, _ = np.histogram(np.minimum(values, right), edges + 0.5)
    beyond = np.zeros(len(heights), bool) if limit is None else edges[:-1] >= limit
    axes.bar(
        edges[:-1] + 0.5, heights, np.diff(edges), align="edge", linewidth=0.3, edgecolor="white",
        color=[_CUT if over else _BAR for over in beyond]
    )  # fmt: skip
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


def _right_end(values: np.ndarray) -> int:
    """Right end of the picture: a few very long records must not compress all others."""
    return min(int(values.max()), int(1.5 * quantile(values, 0.99))) + 1


def _edges(right: int, limit: int | None) -> np.ndarray:
    """Edges of bars of equal width; one edge is at the limit. A bar counts lengths above its first edge, up to its
    second."""
    width = max(-(-right // _MOST_BARS), 1)
    first = (0 if limit is None else limit % width) - width
    return np.arange(first, right + width + 1, width)
