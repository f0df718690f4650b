"""Evaluation while training, the best checkpoint and loss scaling: keys that must fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.metrics import metric_of
from glm_ms.settings.schema import Settings
from glm_ms.settings.sections import LossScaleSettings

Problem = tuple[str, str, tuple[str, ...]]
_SCALE = "runner_wrapper.scale_sense"


def training_problems(settings: Settings) -> Iterator[Problem]:
    """(key, what is wrong with it, other keys it depends on) for each problem of a training run."""
    yield from _intervals(settings)
    yield from _best_metric(settings)
    yield from _loss_scale(settings.runner_wrapper.scale_sense)


def _intervals(settings: Settings) -> Iterator[Problem]:
    intervals = {name: getattr(settings, name) for name in ("eval_step_interval", "eval_epoch_interval")}
    for name, value in intervals.items():
        if value == 0:
            yield name, "found 0, must be -1 (never) or at least 1", ()
    if settings.do_eval and set(intervals.values()) == {-1}:
        message = (
            "True, but eval_step_interval and eval_epoch_interval are both -1; set one of them to say when"
        )
        yield "do_eval", message, tuple(intervals)


def _best_metric(settings: Settings) -> Iterator[Problem]:
    name, key = settings.checkpoint.best_metric, "checkpoint.best_metric"
    if name is None:
        return
    if not settings.do_eval:
        yield (
            key,
            f"{name} is known by evaluation only; set do_eval: True, or best_metric: null",
            ("do_eval",),
        )
    needed = metric_of(name)
    if needed not in settings.metric.type:
        message = (
            f"{name} is measured by {needed}, but metric.type is {', '.join(settings.metric.type)}; add it"
        )
        yield key, message, ("metric.type",)


def _loss_scale(scale: LossScaleSettings) -> Iterator[Problem]:
    dynamic_keys = ("scale_factor", "scale_window")
    if scale.type is None:
        idle, remedy = ("loss_scale_value", *dynamic_keys), "without type; set one, or remove it"
    elif scale.type == "FixedLossScaleUpdateCell":
        idle, remedy = dynamic_keys, f"with {scale.type}; remove it, or use DynamicLossScaleUpdateCell"
    else:
        return
    for name in idle:
        if getattr(scale, name) != getattr(LossScaleSettings(), name):
            yield f"{_SCALE}.{name}", f"has no effect {remedy}", (f"{_SCALE}.type",)
