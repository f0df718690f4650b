"""Classes for users of MindFormers: AutoConfig, AutoModel, AutoTokenizer, Trainer, pipeline."""

from __future__ import annotations

from glm_ms.mindformers_api.registration import register

register()
