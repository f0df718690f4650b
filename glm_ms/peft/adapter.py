"""One interface to adapters of both kinds: attached anew for training, or with stored values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Union

import numpy as np
from mindspore import Parameter

from glm_ms.convert.adapter_files import LORA, PREFIX, AdapterFiles
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.peft import lora, ptuning
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.lora import LoraAdapter, LoraConfig, linear_modules
from glm_ms.peft.ptuning import PrefixAdapter, PrefixConfig
from glm_ms.peft.store import StoredAdapter

AdapterConfig = Union[LoraConfig, PrefixConfig]


class Adapter(Protocol):
    """Trainable float32 parameters on a frozen network.

    Attributes:
        kind: "lora" or "ptuning2".
        config: its settings.
    """

    kind: str
    config: AdapterConfig

    def parameters(self) -> list[Parameter]:
        """The parameters that are trained and saved."""

    def assign(self, tensors: Mapping[str, np.ndarray], source: Path) -> None:
        """Overwrites every parameter; raises AdapterError where names or shapes differ."""

    def restore(self, folder: Path) -> None:
        """Overwrites every parameter with what `save` has written into a folder."""

    def save(self, folder: Path, base_model: str = "") -> None:
        """Writes the files of the adapter into an existing folder."""


def attach_new(network: GLMNetwork, config: AdapterConfig, seed: int = 0) -> Adapter:
    """Attaches an adapter with random values and freezes everything else.

    Args:
        network: without an adapter.
        config: kind and sizes.
        seed: of the random values.

    Raises:
        AdapterError: a target that matches no module, or there is an adapter already.
    """
    _prepare(network)
    adapter: Adapter
    if isinstance(config, LoraConfig):
        adapter = LoraAdapter(network, config, seed=seed)
    else:
        adapter = PrefixAdapter(network, config, seed=seed)
    return adapter


def attach_stored(network: GLMNetwork, stored: StoredAdapter) -> Adapter:
    """Attaches the structure of a stored adapter, without its values: call `assign` with `stored.tensors`.

    Raises:
        AdapterError: a module of the adapter is not in the network, or there is an adapter already.
    """
    if isinstance(stored.config, PrefixConfig):
        return attach_new(network, stored.config)
    modules = stored.modules
    unknown = [name for name in modules if name not in linear_modules(network)]
    if unknown:
        raise AdapterError(
            f"{stored.path}: made for another base: this network has no linear layer {unknown[0]}"
            + (f" ({len(unknown)} of {len(modules)} modules are unknown)" if len(unknown) > 1 else "")
        )
    _prepare(network)
    return LoraAdapter(network, stored.config, modules)


def files_of(config: AdapterConfig) -> AdapterFiles:
    """How an adapter of a kind is stored."""
    return LORA if isinstance(config, LoraConfig) else PREFIX


def write_adapter_config(
    folder: Path, config: AdapterConfig, network: GLMConfig, base_model: str = ""
) -> None:
    """Writes what `Adapter.save` writes beside the tensors into an existing folder.

    Args:
        folder: without that file.
        config: of the adapter.
        network: of the base.
        base_model: where the base weights came from, for the reader of the file.
    """
    if isinstance(config, LoraConfig):
        lora.write_config(folder, config, base_model)
    else:
        ptuning.write_config(folder, config, network, base_model)


def _prepare(network: GLMNetwork) -> None:
    """Freezes the base."""
    attached = [name for name, cell in linear_modules(network).items() if cell.lora is not None]
    if attached or network.transformer.prefix_encoder is not None:
        raise AdapterError("this network has an adapter already; load the base anew for another one")
    for parameter in network.get_parameters():
        parameter.requires_grad = False


def detach(network: GLMNetwork) -> None:
    """Takes the adapter away; the base stays frozen."""
    for cell in linear_modules(network).values():
        cell.lora = None
    network.transformer.prefix_encoder = None
