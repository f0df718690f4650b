"""Parameter-efficient finetuning: LoRA and P-Tuning v2, attached to a network, frozen, saved, loaded, merged."""

from __future__ import annotations

from glm_ms.peft.adapter import Adapter, AdapterConfig, attach_new, attach_stored
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.lora import LoraAdapter, LoraConfig
from glm_ms.peft.merge import lora_deltas
from glm_ms.peft.ptuning import PrefixAdapter, PrefixConfig
from glm_ms.peft.store import StoredAdapter, read_adapter

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "LoraAdapter",
    "LoraConfig",
    "PrefixAdapter",
    "PrefixConfig",
    "StoredAdapter",
    "attach_new",
    "attach_stored",
    "lora_deltas",
    "read_adapter",
]
