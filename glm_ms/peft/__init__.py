"""Parameter-efficient finetuning, LoRA and P-Tuning v2: the table of adapter types. Importing it loads no MindSpore."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm_ms.convert.adapter_files import LORA, PREFIX, AdapterFiles

if TYPE_CHECKING:
    from glm_ms.peft.adapter import Adapter, AdapterConfig


# Far beyond every published adapter, and below what overflows float32 in a product: larger values are mistakes.
MAX_LORA_ALPHA = 1e6


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


def weights_files() -> list[str]:
    """Names of the weights of all types, as this project and `peft` store them."""
    return [name for kind in ADAPTERS.values() for name in (kind.files.weights, *kind.others)]


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder contains an adapter of this project or of `peft`, and so no base weights."""
    return any((path / name).is_file() for name in weights_files())
