"""Curves of a run as PNG files beside its logs: loss, learning rate, gradient norm, evaluation scores."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glm_ms.metrics import METRICS, score_names
from glm_ms.storage.atomic import replace_bytes
from glm_ms.storage.errors import not_written
from glm_ms.storage.run_folder import EVAL_METRICS_FILE, METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = "plots"
TRAINING_NUMBERS = ("epoch", "loss", "learning_rate", "grad_norm", "overflow", "loss_scale")
# A plot is about a thousand pixels wide: more points would not be visible.
MAX_POINTS = 2000
_MARKED_POINTS = 40  # curves of at most so many points have a marker at each
_FEWEST_SMOOTHED = 20  # shorter curves are not smoothed
_LOG_SCALE_FROM = 20.0  # a logarithmic axis if the largest value is that many times the smallest
_RAW, _LINE, _EVALUATION, _WARNING = "#9ec5e8", "#1f5f99", "#d9541e", "#c00000"
_SCORE_COLORS = ("#1f5f99", "#4c9f70", "#8457a8", "#b8860b")


class Curve(NamedTuple):
    """Values, float64 [points], over updates, int64 [points], rising; NaN where the run had no finite value."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> Curve:
        """The points that can be drawn."""
        known = np.isfinite(self.values)
        return Curve(self.steps[known], self.values[known])


Curves = dict[str, Curve]


def write_plots(output_dir: Path, say: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Draws `metrics.jsonl` and, if it exists, `eval_metrics.jsonl` into `plots/*.png`.

    A finished run must not fail because of a picture, so nothing is raised: `say` gets a line with the reason for a
    plot that cannot be drawn. Each file is whole or absent; one without numbers is removed. Returns the files written.
    """
    try:
        import matplotlib.backends.backend_agg  # noqa: F401 - half a second that only plots need
    except ImportError as error:
        say(f"no plots: matplotlib cannot be imported ({error}); pip install matplotlib")
        return []
    training = _read(output_dir / METRICS_FILE, TRAINING_NUMBERS, say)
    evaluation = _read(output_dir / EVAL_METRICS_FILE, score_names(), say)
    if not any(curve.finite().steps.size for curve in (*training.values(), *evaluation.values())):
        say(f"no plots: {output_dir / METRICS_FILE} has no numbers")
    written = []
    for name, draw in _FIGURES.items():
        path = output_dir / PLOTS / f"{name}.png"
        try:
            figure = draw(training, evaluation)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            _save(figure, path)
            written.append(path)
        except OSError as error:
            say(f"no plot: {not_written(path, error)}")
        except (ValueError, RuntimeError, OverflowError) as error:
            say(f"no plot {path}: {error}")
    return written


def _read(path: Path, names: Iterable[str], say: Callable[[str], None]) -> Curves:
    """Name -> curve for those of `names` that occur in a file of JSON lines; an absent file has none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        say(f"{path}: cannot be read for the plots: {error.strerror or error}")
        return {}
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    broken = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            broken.append(number)
            continue
        for name, points in found.items():
            if name in record:
                points[record["step"]] = _number(record[name])
    if broken:
        say(
            f"{path}: lines that are not a record of a step are left out of the plots: {len(broken)} of "
            f"{len(lines)}, the first is line {broken[0]}"
        )
    curves = {}
    for name, points in found.items():
        if points:
            steps = sorted(points)
            curves[name] = Curve(np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64))
    return curves


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and 0 <= step < 2**63 else None


def _number(value: Any) -> float:
    """NaN for null, which a run writes for a value that is not finite, and for anything that is not a number."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else float("nan")


def thin(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` points: smallest and largest of equal intervals, so that no spike is lost."""
    if curve.steps.size <= max_points:
        return curve
    curve = curve.finite()
    kept: set[int] = set()
    for part in np.array_split(np.arange(curve.steps.size), max_points // 2):
        if part.size:
            values = curve.values[part]
            kept.update((int(part[values.argmin()]), int(part[values.argmax()])))
    order = sorted(kept)
    return Curve(curve.steps[order], curve.values[order])


def smooth(curve: Curve, span: float) -> Curve:
    """Exponential moving average with the weight 2 / (span + 1) for the newest point, without its bias to 0."""
    curve = curve.finite()
    keep, mean, weight = 1 - 2 / (span + 1), 0.0, 0.0
    means = []
    for value in curve.values.tolist():
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return Curve(curve.steps, np.array(means))


def _loss_figure(training: Curves, evaluation: Curves) -> Figure | None:
    curves = [each["loss"] for each in (training, evaluation) if _has_points(each, "loss")]
    if not curves:
        return None
    figure, (axes,) = _axes(training)
    if "loss" in training:
        _noisy_line(axes, training["loss"], "training")
        _mark_unusable(axes, training, "loss")
    if _has_points(evaluation, "loss"):
        _line(axes, evaluation["loss"], _EVALUATION, "evaluation", marked=True)
    _finish(axes, "Loss", "loss (nats a token)", curves)
    return figure


def _training_figure(name: str, title: str, label: str, training: Curves, _: Curves) -> Figure | None:
    if not _has_points(training, name):
        return None
    curve = training[name]
    figure, (axes,) = _axes(training)
    if name == "grad_norm":
        _noisy_line(axes, curve, "every update")
    else:
        _line(axes, curve, _LINE, drawstyle="steps-post" if name == "loss_scale" else "default")
    if name != "learning_rate":
        _mark_unusable(axes, training, name)
    _finish(axes, title, label, [curve], log=None if name == "grad_norm" else False)
    if name == "loss_scale":
        axes.set_yscale("log", base=2)  # it is halved and doubled
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    return figure


def _eval_scores_figure(training: Curves, evaluation: Curves) -> Figure | None:
    panels = []
    for metric in METRICS.values():
        curves = {name: evaluation[name] for name in metric.plotted if _has_points(evaluation, name)}
        panels += [(metric, curves)] if curves else []
    if not panels:
        return None
    figure, all_axes = _axes(training, len(panels))
    for axes, (metric, curves) in zip(all_axes, panels):
        alone = len(metric.plotted) == 1
        for (name, curve), color in zip(curves.items(), itertools.cycle(_SCORE_COLORS)):
            label, color = (None, _EVALUATION) if alone else (name.upper(), color)
            _line(axes, curve, color, label, marked=True)
        _finish(axes, f"Evaluation: {metric.title}", metric.unit, list(curves.values()), log=None if alone else False)
    return figure


def _has_points(curves: Curves, name: str) -> bool:
    return name in curves and bool(curves[name].finite().steps.size)


_FIGURES: dict[str, Callable[[Curves, Curves], Any]] = {
    "loss": _loss_figure,
    "learning_rate": partial(_training_figure, "learning_rate", "Learning rate", "learning rate"),
    "grad_norm": partial(_training_figure, "grad_norm", "Gradient norm", "global norm, before clipping"),
    "loss_scale": partial(_training_figure, "loss_scale", "Loss scale", "loss scale"),
    "eval_scores": _eval_scores_figure,
}


def _axes(training: Curves, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels above one another. Without pyplot, which keeps figures and sets the backend of the process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 3.2 * panels), dpi=110, layout="constrained", facecolor="white")
    all_axes = [figure.add_subplot(panels, 1, place + 1) for place in range(panels)]
    all_axes[-1].set_xlabel("update (step)")
    epochs = training["epoch"].finite() if _has_points(training, "epoch") else None
    if epochs is not None and epochs.values[-1] > 0 and epochs.steps[-1] > 0:
        steps_per_epoch = epochs.steps[-1] / epochs.values[-1]
        scales = (lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch)
        all_axes[0].secondary_xaxis("top", scales).set_xlabel("epoch")
    return figure, all_axes


def _noisy_line(axes: Axes, curve: Curve, label: str) -> None:
    """A curve and, if it is long enough, the smoothed one on top of it."""
    if curve.steps.size < _FEWEST_SMOOTHED:
        _line(axes, curve, _LINE, label)
        return
    span = min(max(curve.steps.size / 50, 5), 500)
    _line(axes, curve, _RAW, label, linewidth=0.8)
    steps = span * np.diff(curve.steps).mean()
    _line(axes, smooth(curve, span), _LINE, f"smoothed over about {steps:,.0f} steps")


def _line(axes: Axes, curve: Curve, color: str, label: str | None = None, marked: bool = False, **style: Any) -> None:
    """A line with gaps at missing values. Points without a neighbour get a marker, or they would be invisible."""
    curve = thin(curve)
    known = np.isfinite(curve.values)
    beside = np.zeros_like(known)
    beside[1:] |= known[:-1]
    beside[:-1] |= known[1:]
    every = known if marked or known.sum() <= _MARKED_POINTS else known & ~beside
    if every.any():
        style = {**style, "marker": "o", "markersize": 4.5 if marked else 3.5}
        style["markevery"] = np.flatnonzero(every).tolist()
    axes.plot(curve.steps, curve.values, color=color, label=label, **{"linewidth": 1.4, **style})


def _mark_unusable(axes: Axes, training: Curves, name: str) -> None:
    """Crosses at the bottom for values that are not finite and for updates skipped after an overflow."""
    overflow = training.get("overflow", Curve(np.zeros(0, np.int64), np.zeros(0)))
    overflows = overflow.steps[overflow.values > 0]
    curve = training[name]
    lost = np.setdiff1d(curve.steps[~np.isfinite(curve.values)], overflows)
    for steps, color, label in ((overflows, _LINE, "overflow, update skipped"), (lost, _WARNING, "not finite")):
        if steps.size:
            few = thin(Curve(steps, np.zeros(steps.size))).steps
            axes.plot(
                few, np.full(few.size, 0.02), "x", color=color, markersize=6, label=f"{label} ({steps.size})",
                transform=axes.get_xaxis_transform(), clip_on=False
            )  # fmt: skip


def _finish(axes: Axes, title: str, label: str, curves: list[Curve], log: bool | None = None) -> None:
    """Title, units, scales and grid."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    values = np.concatenate([curve.finite().values for curve in curves])
    positive = bool(values.size) and bool(values.min() > 0)
    if positive and (log or (log is None and values.max() / values.min() > _LOG_SCALE_FROM)):
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    last = max(int(curve.steps[-1]) for curve in curves)
    axes.set_xlim(0, max(last, 1) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(label)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    path.parent.mkdir(exist_ok=True)  # without its parents: the output folder may be gone
    replace_bytes(path, image.getvalue())
