"""The device of a run without training, by MindSpore alone: importing MindFormers takes seconds."""

from __future__ import annotations

import os
import re

import mindspore as ms
from mindspore.communication import init

from glm_ms.settings import Settings

# MindSpore refuses a device in a process that has computed already, or has set one.
_IN_USE = re.compile("has been initialized|can not be (modified|set repeatedly)")


def set_device(settings: Settings) -> None:
    """Sets mode, device and memory as the settings say, and connects the ranks of a parallel run.

    A program that has used MindSpore before keeps its device, and its memory limit, if it is the one of the settings.

    Raises RuntimeError or ValueError, of MindSpore, for a device or a rank that cannot be used.
    """
    context = settings.context
    ms.set_context(mode=context.mode)
    # MindSpore numbers the cards of ranks that msrun starts itself, and a CPU has no number.
    numbered = context.device_target != "CPU" and "MS_ROLE" not in os.environ
    number = context.device_id if numbered else None
    try:
        ms.set_device(context.device_target, number)
        if context.max_device_memory is not None:
            ms.runtime.set_memory(max_size=context.max_device_memory)
    except RuntimeError as error:
        if not (_IN_USE.search(str(error)) and _is_current(context.device_target, number)):
            raise
    if settings.use_parallel:
        init()
        ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL)


def _is_current(target: str, number: int | None) -> bool:
    return ms.get_context("device_target") == target and number in (None, ms.get_context("device_id"))
