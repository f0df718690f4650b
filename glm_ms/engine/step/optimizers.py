"""The optimizer and the learning-rate schedule that the settings name."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from mindspore.nn.learning_rate_schedule import LearningRateSchedule

from glm_ms.settings.optimizers import OPTIMIZERS, SCHEDULES
from glm_ms.settings.schema import LRScheduleSettings

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_schedule", "optimizer_class"]


def optimizer_class(name: str) -> type:
    """The class of OPTIMIZERS[name]."""
    return _load(OPTIMIZERS[name])


def build_schedule(settings: LRScheduleSettings, run_steps: int) -> LearningRateSchedule:
    """The schedule of `lr_schedule`, a function of the number of updates made.

    Args:
        settings: the section.
        run_steps: updates of the whole run, which replace `total_steps: -1`.
    """
    values: dict[str, Any] = {"learning_rate": settings.learning_rate, "warmup_steps": settings.warmup_steps}
    values["total_steps"] = run_steps if settings.total_steps == -1 else settings.total_steps
    if settings.warmup_ratio is not None:
        values["warmup_steps"] = int(settings.warmup_ratio * values["total_steps"])
    for key in dataclasses.fields(settings):
        if settings.type in key.metadata.get("used_with", ("type", ()))[1]:
            values[key.name] = getattr(settings, key.name)
    return _load(SCHEDULES[settings.type])(**values)


def _load(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
