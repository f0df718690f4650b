"""Enters our classes into MindFormers' registry, under names of our own: it overwrites equal names silently."""

from __future__ import annotations

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from glm_ms.engine.adamw import GLMAdamW
from glm_ms.engine.train_step import GLMTrainOneStep
from glm_ms.engine.trainer import GLMTrainer

REGISTERED = {
    GLMAdamW: MindFormerModuleType.OPTIMIZER,
    GLMTrainOneStep: MindFormerModuleType.WRAPPER,
    GLMTrainer: MindFormerModuleType.TRAINER,
}


def register() -> None:
    """Registers every class of REGISTERED; safe to call again."""
    for cls, kind in REGISTERED.items():
        MindFormerRegister.register_cls(cls, kind)
