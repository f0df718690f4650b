"""Text generation: the model object, sampling, beam search, streaming."""

from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.glm import GLMForCausalLM

__all__ = ["GLMForCausalLM", "GenerationConfig"]
