"""ChatGLM2-6B and ChatGLM3-6B on MindSpore. The names below are loaded on first use; none needs mindformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from glm_ms.version import __version__

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.model.config import GLMConfig
    from glm_ms.pretrained import load_pretrained
    from glm_ms.tokenizer import ChatGLM2Tokenizer, ChatGLM3Tokenizer

_HOME = {
    "GLMConfig": "glm_ms.model.config",
    "GLMForCausalLM": "glm_ms.generation",
    "load_pretrained": "glm_ms.pretrained",
    "ChatGLM2Tokenizer": "glm_ms.tokenizer",
    "ChatGLM3Tokenizer": "glm_ms.tokenizer",
}

__all__ = ["ChatGLM2Tokenizer", "ChatGLM3Tokenizer", "GLMConfig", "GLMForCausalLM", "__version__", "load_pretrained"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'glm_ms' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
