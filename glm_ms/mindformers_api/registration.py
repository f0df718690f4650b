"""Registers the classes of glm_ms in MindFormers."""

from __future__ import annotations

from pathlib import Path

from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import glm_ms.engine.mindformers_internals as internals
from glm_ms.engine.mindformers_internals import MindFormerModuleType
from glm_ms.engine.step.adamw import GLMAdamW
from glm_ms.engine.step.train_step import GLMTrainOneStep
from glm_ms.engine.step.training import GLMTrainer
from glm_ms.mindformers_api.config import TOKENIZER_CLASS, MindFormersGLMConfig
from glm_ms.mindformers_api.dataset import GLMDataset
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.released import MODEL_NAMES, is_name, yaml_path
from glm_ms.mindformers_api.run_yaml import CONFIG_TYPE, MODEL_TYPE, is_run_yaml, read_for_mindformers, yaml_in
from glm_ms.mindformers_api.tokenizer import ChatGLMTokenizer, GLM2Tokenizer, GLM3Tokenizer, GLMTextProcessor
from glm_ms.mindformers_api.trainer import GLMTextGenerationTrainer
from glm_ms.pretrained import read_tokenizer_config
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import CHECKPOINTS

REGISTERED = {
    GLMAdamW: MindFormerModuleType.OPTIMIZER,
    GLMTrainOneStep: MindFormerModuleType.WRAPPER,
    GLMTrainer: MindFormerModuleType.TRAINER,
    GLMTextGenerationTrainer: MindFormerModuleType.TRAINER,
    MindFormersGLMConfig: MindFormerModuleType.CONFIG,
    MindFormersGLM: MindFormerModuleType.MODELS,
    GLM2Tokenizer: MindFormerModuleType.TOKENIZER,
    GLM3Tokenizer: MindFormerModuleType.TOKENIZER,
    GLMTextProcessor: MindFormerModuleType.PROCESSOR,
    GLMDataset: MindFormerModuleType.DATASET,
}
# Names in YAML files.
ALIASES = {MindFormersGLMConfig: CONFIG_TYPE, MindFormersGLM: MODEL_TYPE}


def register() -> None:
    """Makes MindFormers know every class of REGISTERED, YAML files and folders of ChatGLM, and names of models.

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
    for name in MODEL_NAMES:
        internals.add_model_name(name, yaml_path(name))
    internals.extend_yaml_reader(is_run_yaml, read_for_mindformers)
    for auto_class, accepts, load in (
        (AutoConfig, _is_model, MindFormersGLMConfig.from_pretrained),
        (AutoModel, _is_model, MindFormersGLM.from_pretrained),
        (AutoModelForCausalLM, _is_model, MindFormersGLM.from_pretrained),
        (AutoTokenizer, _is_tokenizer, ChatGLMTokenizer.from_pretrained),
        (AutoProcessor, _is_tokenizer, GLMTextProcessor.from_pretrained),
    ):
        internals.extend_from_pretrained(auto_class, accepts, load)


def _is_model(path: str) -> bool:
    """Whether a path is one of `_is_yaml`, a config.json of ChatGLM, or a folder with one of both."""
    file = Path(path)
    if file.is_dir():
        if (file / "config.json").is_file():
            return _is_config(file / "config.json")
        return (file / CHECKPOINTS).is_dir() or yaml_in(file) is not None
    if file.suffix == ".json":
        return _is_config(file)
    return _is_yaml(path)


def _is_tokenizer(path: str) -> bool:
    """Whether a path is one of `_is_yaml`, or a folder of a ChatGLM tokenizer, model or run."""
    file = Path(path)
    if not file.is_dir():
        return _is_yaml(path)
    try:
        name = read_tokenizer_config(file).get("tokenizer_class")
    except FileError:  # MindFormers reports it
        return False
    if name is not None:
        return name == TOKENIZER_CLASS
    if (file / "config.json").is_file():
        return _is_config(file / "config.json")
    return yaml_in(file) is not None


def _is_yaml(path: str) -> bool:
    """Whether a path is the name of a model, a YAML of ChatGLM2 or ChatGLM3, or a missing YAML."""
    if Path(path).suffix in (".yaml", ".yml"):
        return not Path(path).exists() or is_run_yaml(path)  # for a missing one, glm_ms suggests similar names
    return is_name(path)


def _is_config(path: Path) -> bool:
    try:
        return read_object(path).get("model_type") == MindFormersGLMConfig.model_type
    except FileError:  # missing or broken: MindFormers reports it
        return False
