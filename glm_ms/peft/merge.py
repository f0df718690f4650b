"""LoRA updates as plain differences of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from glm_ms.peft import lora
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.store import StoredAdapter


def lora_deltas(stored: StoredAdapter, remove: bool = False) -> dict[str, Callable[[], np.ndarray]]:
    """What merging adds to each weight.

    Args:
        stored: a LoRA adapter.
        remove: take a merged adapter out again.

    Returns:
        Name of the weight -> function that computes the difference, float32 [out, in], when it is needed: one of
        the 6B has the size of its weight.

    Raises:
        AdapterError: a P-Tuning prefix, which is no change of weights; half a pair; an adapter that changes nothing.
    """
    if not isinstance(stored.config, LoraConfig):
        raise AdapterError(
            f"{stored.path}: a P-Tuning prefix cannot be merged into weights; use it as an adapter"
        )
    factor = -stored.config.scaling if remove else stored.config.scaling
    deltas = {}
    for module in stored.modules:
        halves = [stored.tensors.get(f"{module}.{ending}") for ending in (lora.A, lora.B)]
        if halves[0] is None or halves[1] is None:
            raise AdapterError(f"{stored.path}: {module} has only one of lora_A and lora_B")
        deltas[f"{module}.weight"] = partial(_product, halves[1], halves[0], np.float32(factor))
    if not any(stored.tensors[f"{module}.{lora.B}"].any() for module in stored.modules):
        raise AdapterError(
            f"{stored.path}: every lora_B is zero, so this adapter changes nothing; was it trained?"
        )
    return deltas


def _product(b: np.ndarray, a: np.ndarray, factor: np.float32) -> np.ndarray:
    return (b @ a) * factor
