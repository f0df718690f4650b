"""Registers the classes of glm_ms in MindFormers."""

from __future__ import annotations

from pathlib import Path

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import glm_ms.engine.mindformers_internals as internals
from glm_ms.engine.mindformers_internals import MindFormerModuleType
from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.step.training import GLMTrainer
from glm_ms.mindformers_api.config import CONFIG_TYPE, MODEL_TYPE, TOKENIZER_CLASS, MindFormersGLMConfig
from glm_ms.mindformers_api.dataset import GLMDataset
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.run_yaml import is_run_yaml, mindformers_document, read_run_yaml
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer, GLM2Tokenizer, GLM3Tokenizer, read_tokenizer_config
from glm_ms.mindformers_api.trainer import GLMTextGenerationTrainer
from glm_ms.resources import resource
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_object

REGISTERED = {
    GLMAdamW: MindFormerModuleType.OPTIMIZER,
    GLMTrainOneStep: MindFormerModuleType.WRAPPER,
    GLMTrainer: MindFormerModuleType.TRAINER,
    GLMTextGenerationTrainer: MindFormerModuleType.TRAINER,
    MindFormersGLMConfig: MindFormerModuleType.CONFIG,
    MindFormersGLM: MindFormerModuleType.MODELS,
    GLM2Tokenizer: MindFormerModuleType.TOKENIZER,
    GLM3Tokenizer: MindFormerModuleType.TOKENIZER,
    GLMDataset: MindFormerModuleType.DATASET,
}
# Names in YAML files.
ALIASES = {MindFormersGLMConfig: CONFIG_TYPE, MindFormersGLM: MODEL_TYPE}
# Model name of `Trainer(task="text_generation", model_name=...)` -> its YAML.
MODEL_NAMES = {
    "glm2_tiny": "configs/tiny/finetune_glm2_tiny.yaml",
    "glm3_tiny": "configs/tiny/finetune_glm3_tiny.yaml",
    "glm2_6b": "configs/glm2/run_glm2_6b_finetune_800T_A2_64G.yaml",
    "glm3_6b": "configs/glm3/run_glm3_6b_finetune_800T_A2_64G.yaml",
}


def register() -> None:
    """Makes MindFormers know every class of REGISTERED, the YAML files of glm_ms and ChatGLM folders.

    A second call changes nothing. Raises NameTakenError if MindFormers has something else under one of the names.
    """
    for cls, kind in REGISTERED.items():
        for name in {cls.__name__, ALIASES.get(cls, cls.__name__)}:
            internals.register_class(cls, kind, name)
    model_type = MindFormersGLMConfig.model_type
    configs = internals.CONFIG_MAPPING
    # Not get, which does not know registered classes.
    found = configs[model_type] if model_type in configs else None  # noqa: SIM401
    internals.check_name_is_free(found, model_type, MindFormersGLMConfig, "AutoConfig")
    AutoConfig.register(model_type, MindFormersGLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(MindFormersGLMConfig, MindFormersGLM, exist_ok=True)
    AutoTokenizer.register(MindFormersGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    for name, path in MODEL_NAMES.items():
        internals.add_model_name(name, str(resource(path)))
    internals.extend_yaml_reader(is_run_yaml, lambda path: mindformers_document(read_run_yaml(path)))
    internals.extend_auto_tokenizer(_has_glm_tokenizer, ChatGLMTokenizer.from_pretrained)


def _has_glm_tokenizer(path: Path) -> bool:
    """Whether a path is a YAML of glm_ms, a missing YAML, or a folder of a ChatGLM tokenizer or model."""
    if path.suffix in (".yaml", ".yml"):
        return not path.exists() or is_run_yaml(path)  # for a missing one, glm_ms suggests similar names
    try:
        name = read_tokenizer_config(path).get("tokenizer_class")
        if name is not None:
            return name == TOKENIZER_CLASS
        return read_object(path / "config.json").get("model_type") == MindFormersGLMConfig.model_type
    except FileError:  # missing or broken: MindFormers reports it
        return False
