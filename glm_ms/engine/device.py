"""The device of a run without training, by MindSpore alone: importing MindFormers takes seconds."""

from __future__ import annotations

import os

import mindspore as ms
from mindspore.communication import init

from glm_ms.settings import Settings


def set_device(settings: Settings) -> None:
    """Sets mode, device and memory as the settings say, and connects the ranks of a parallel run.

    Raises RuntimeError or ValueError, of MindSpore, for a device or a rank that cannot be used.
    """
    context = settings.context
    ms.set_context(mode=context.mode)
    # MindSpore numbers the cards of ranks that msrun starts itself, and a CPU has no number.
    numbered = context.device_target != "CPU" and "MS_ROLE" not in os.environ
    ms.set_device(context.device_target, context.device_id if numbered else None)
    if context.max_device_memory is not None:
        ms.runtime.set_memory(max_size=context.max_device_memory)
    if settings.use_parallel:
        init()
        ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL)
