"""Parameter-efficient finetuning: LoRA and P-Tuning v2, attached to a network, saved, loaded, merged.

`ADAPTERS` is the table of adapter types. Importing this package loads no MindSpore; the names below are loaded on first
use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm_ms.convert.adapter_files import LORA, PREFIX, AdapterFiles

if TYPE_CHECKING:
    from glm_ms.peft.adapter import Adapter, AdapterConfig, attach
    from glm_ms.peft.lora import LoraConfig, lora_deltas
    from glm_ms.peft.ptuning import PrefixConfig
    from glm_ms.peft.store import AdapterError, StoredAdapter, read_adapter


@dataclass(frozen=True)
class AdapterType:
    """One type of adapter.

    Attributes:
        home: module:class of its `Adapter`.
        files: names of what it stores.
        keys: key of `model.pet_config` -> field of its config.
        others: names of its weights in folders of other programs.
    """

    home: str
    files: AdapterFiles
    keys: Mapping[str, str]
    others: tuple[str, ...] = ()

    def load(self) -> type[Adapter]:
        """The class."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)

    def config(self, pet: object) -> AdapterConfig:
        """The config that `model.pet_config` asks for."""
        values = {field: getattr(pet, key) for key, field in self.keys.items()}
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
        return self.load().config_class(**values)


# Value of `model.pet_config.pet_type` -> type.
ADAPTERS: dict[str, AdapterType] = {
    "lora": AdapterType(
        "glm_ms.peft.lora:LoraAdapter", LORA,
        {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"},
        ("adapter_model.bin",)
    ),
    "ptuning2": AdapterType(
        "glm_ms.peft.ptuning:PrefixAdapter", PREFIX,
        {"pre_seq_len": "pre_seq_len", "prefix_projection": "prefix_projection", "projection_dim": "projection_dim",
         "dropout_prob": "dropout"}
    ),
}  # fmt: skip

_HOMES = {
    "Adapter": "adapter", "AdapterConfig": "adapter", "attach": "adapter",
    "LoraConfig": "lora", "lora_deltas": "lora", "PrefixConfig": "ptuning",
    "AdapterError": "store", "StoredAdapter": "store", "read_adapter": "store",
}  # fmt: skip

__all__ = [
    "ADAPTERS", "Adapter", "AdapterConfig", "AdapterError", "AdapterType", "LoraConfig", "PrefixConfig",
    "StoredAdapter", "attach", "lora_deltas", "read_adapter",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glm_ms.peft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"glm_ms.peft.{_HOMES[name]}"), name)
