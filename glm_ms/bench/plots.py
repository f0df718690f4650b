"""Figures of measurements: how cost grows with context, rows, layers and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm_ms.bench.measure import DECODE, PREFILL, Group, Result
from glm_ms.bench.workers import BenchError

_PANEL = (4.4, 3.3)  # inches
_DPI = 90
# Title -> what is on the x axis, results that count, value on the y axis, its label.
_PANELS: dict[str, tuple[Callable[[Result], int], Callable[[Result], bool], Callable[[Result], float], str]] = {
    "context, tokens": (
        lambda r: r.case.tokens, lambda r: r.case.mode == DECODE, lambda r: r.median * 1e3, "ms per step"
    ),
    "rows": (
        lambda r: r.case.rows, lambda r: r.case.mode == DECODE, lambda r: r.case.rows / r.median, "tokens per second"
    ),
    "prompt, tokens": (
        lambda r: r.case.tokens, lambda r: r.case.mode == PREFILL, lambda r: r.case.tokens / r.median,
        "tokens per second"
    ),
    "layers": (lambda r: r.layers, lambda r: r.case.mode == DECODE, lambda r: r.median * 1e3, "ms per step"),
    "threads": (lambda r: r.threads, lambda r: r.case.mode == DECODE, lambda r: r.median * 1e3, "ms per step"),
}  # fmt: skip


def draw(groups: Sequence[Group], path: Path) -> None:
    """Writes one PNG with a panel for everything of which several values were measured.

    A curve has the smallest value of everything else, so that only one thing changes along it.

    Raises:
        BenchError: nothing has several values, or the file cannot be written.
    """
    panels = check_plottable([result for group in groups for result in group.results if result.samples])
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # seconds of imports
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * len(panels), _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        _panel(axes, title, curves)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_plottable(results: Sequence[Result]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title -> curves of every panel. Raises BenchError if nothing has several values."""
    panels = {title: curves for title in _PANELS if (curves := curves_of(title, results))}
    if not panels:
        raise BenchError(
            "nothing to plot: decode, batch or context needs several values of --context, --rows, --layers or "
            "--threads, prefill several of --length"
        )
    return panels


def curves_of(title: str, results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    """Program -> (x, y) points of a panel, those programs with several x."""
    key, counts, value, _ = _PANELS[title]
    chosen = [result for result in results if counts(result)]
    others = [other for other in _PANELS if other != title]
    for other in others:  # rows, layers and threads stay the smallest when the context changes
        other_key, other_counts = _PANELS[other][:2]
        if any(other_counts(result) for result in chosen):
            smallest = min(other_key(result) for result in chosen)
            if other_key is not key and not _same_axis(other, title):
                chosen = [result for result in chosen if other_key(result) == smallest]
    curves: dict[str, list[tuple[int, float]]] = {}
    for result in chosen:
        curves.setdefault(result.name, []).append((key(result), value(result)))
    return {name: sorted(points) for name, points in curves.items() if len({x for x, _ in points}) > 1}


def _same_axis(one: str, other: str) -> bool:
    tokens = ("context, tokens", "prompt, tokens")
    return one in tokens and other in tokens


def _panel(axes: Any, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in sorted(curves.items()):
        axes.plot(*zip(*points), marker="o", markersize=3, label=name)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(title)
    axes.set_ylabel(_PANELS[title][3])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
