"""GLM for users of MindFormers: importing this package registers its classes in MindFormers 1.9.

After the import, AutoConfig, AutoModel, AutoTokenizer, Trainer and pipeline take the YAML files of glm_ms, its run
folders and Hugging Face folders of ChatGLM2 and ChatGLM3.
"""

from __future__ import annotations

from glm_ms.mindformers_api.config import MindFormersGLMConfig
from glm_ms.mindformers_api.model import MindFormersGLM
from glm_ms.mindformers_api.registration import register
from glm_ms.mindformers_api.tokenizer import GLM2Tokenizer, GLM3Tokenizer
from glm_ms.mindformers_api.trainer import GLMTextGenerationTrainer

__all__ = ["GLM2Tokenizer", "GLM3Tokenizer", "GLMTextGenerationTrainer", "MindFormersGLM", "MindFormersGLMConfig"]

register()
