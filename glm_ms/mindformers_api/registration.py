"""Enters our classes into MindFormers' registry and tables, under names of our own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from mindformers.mindformer_book import MindFormerBook
from mindformers.models.auto.configuration_auto import CONFIG_MAPPING
from mindformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.step.trainer import GLMTrainer
from glm_ms.mindformers_api.auto import GLMConfig
from glm_ms.mindformers_api.dataset import GLMDataset
from glm_ms.mindformers_api.model import GLMForCausalLM
from glm_ms.mindformers_api.tokenizer import (
    ChatGLMTokenizer,
    GLM2Tokenizer,
    GLM3Tokenizer,
    install_auto_tokenizer,
)
from glm_ms.mindformers_api.trainer import GLMTextGenerationTrainer
from glm_ms.mindformers_api.yaml import install_reader

REGISTERED = {
    GLMAdamW: MindFormerModuleType.OPTIMIZER,
    GLMTrainOneStep: MindFormerModuleType.WRAPPER,
    GLMTrainer: MindFormerModuleType.TRAINER,
    GLMTextGenerationTrainer: MindFormerModuleType.TRAINER,
    GLMConfig: MindFormerModuleType.CONFIG,
    GLMForCausalLM: MindFormerModuleType.MODELS,
    GLM2Tokenizer: MindFormerModuleType.TOKENIZER,
    GLM3Tokenizer: MindFormerModuleType.TOKENIZER,
    GLMDataset: MindFormerModuleType.DATASET,
}
# Name for `Trainer(task="text_generation", model_name=...)` -> YAML, from the folder of the repository.
MODEL_NAMES = {
    "glm2_tiny": "configs/tiny/finetune_glm2_tiny.yaml",
    "glm3_tiny": "configs/tiny/finetune_glm3_tiny.yaml",
    "glm2_6b": "configs/glm2/run_glm2_6b_finetune_800T_A2_64G.yaml",
    "glm3_6b": "configs/glm3/run_glm3_6b_finetune_800T_A2_64G.yaml",
}


class NameTakenError(RuntimeError):
    """MindFormers holds something else under one of our names; it would have been replaced without a word."""


def register() -> None:
    """Makes MindFormers know every class of REGISTERED; safe to call again.

    Raises:
        NameTakenError: another class has one of the names.
    """
    for cls, kind in REGISTERED.items():
        _check_free(MindFormerRegister.registry.get(kind, {}), cls.__name__, cls, f"registry of kind {kind}")
        MindFormerRegister.register_cls(cls, kind)
    if GLMConfig.model_type in CONFIG_MAPPING:
        found = {GLMConfig.model_type: CONFIG_MAPPING[GLMConfig.model_type]}
        _check_free(found, GLMConfig.model_type, GLMConfig, "AutoConfig")
    AutoConfig.register(GLMConfig.model_type, GLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(GLMConfig, GLMForCausalLM, exist_ok=True)
    if importlib.util.find_spec("mindformers.models.glm") is None:
        # Names the tokenizer of released ChatGLM folders, in a module that this MindFormers does not have.
        TOKENIZER_MAPPING_NAMES.pop("glm", None)
    AutoTokenizer.register(GLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    _add_model_names()
    install_reader()
    install_auto_tokenizer()


def _check_free(table: dict[str, Any], name: str, cls: type, where: str) -> None:
    found = table.get(name)
    if found is not None and (found.__module__, found.__qualname__) != (cls.__module__, cls.__qualname__):
        raise NameTakenError(
            f"MindFormers' {where} has {found.__module__}.{found.__qualname__} as {name!r}, which glm_ms needs for its "
            "own class; import glm_ms.engine without the package that put it there"
        )


def _add_model_names() -> None:
    names = MindFormerBook.get_trainer_support_task_list()["text_generation"]
    root = Path(__file__).resolve().parents[2]
    for name, path in MODEL_NAMES.items():
        inside = str(root / path) if (root / path).is_file() else path
        if names.setdefault(name, inside) != inside:
            raise NameTakenError(
                f"MindFormers has {names[name]} for the model {name!r}, which glm_ms brings as {path}"
            )
