"""Adapters on disk: those of this project, of the library `peft`, and P-Tuning checkpoints of the original code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_ms.convert.reader import open_checkpoint
from glm_ms.peft import ADAPTERS
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.run_folder import resolve_checkpoint

if TYPE_CHECKING:
    from glm_ms.peft.adapter import AdapterConfig

# The original P-Tuning code saves its encoder under these names.
_ORIGINAL = ("model.safetensors", "pytorch_model.bin")


class AdapterError(CheckpointError):
    """An adapter cannot be built, read, or does not belong to its network; the message names file and remedy."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that has been read.

    Attributes:
        path: its file.
        config: its settings; the dropout matters only if it is trained further.
        tensors: name of the parameter -> float32 array.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, np.ndarray]

    @property
    def modules(self) -> list[str]:
        """Names of the linear layers a LoRA adapter changes, in the order of the file."""
        return list(dict.fromkeys(name.rpartition(".lora_")[0] for name in self.tensors if ".lora_" in name))

    @property
    def norm(self) -> float:
        """Root of the sum of squares over all tensors."""
        return float(np.sqrt(sum(np.square(t, dtype=np.float64).sum() for t in self.tensors.values())))


def read_adapter(path: str | Path) -> StoredAdapter:
    """Reads an adapter.

    Args:
        path: a folder of this project or of `peft` (`adapter_config.json`, `adapter_model.safetensors` or .bin), a
            P-Tuning checkpoint of the original code (`pytorch_model.bin` or `model.safetensors` with
            `transformer.prefix_encoder.*`), the output folder of a run, or the file of weights itself.

    Raises:
        AdapterError: there is none, it is empty, damaged, or of a type that cannot be used.
    """
    try:
        path = _weights_file(resolve_checkpoint(path))
        with open_checkpoint(path) as reader:
            kind = ADAPTERS[_kind_of(path, reader.names())].load()
            tensors = {kind.plain_name(name): reader.read(name, "float32") for name in reader.names()}
    except AdapterError:
        raise
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    return StoredAdapter(path, kind.stored_config(path, tensors), tensors)


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder contains an adapter of this project or of `peft`, and so no base weights."""
    return any((path / name).is_file() for name in _weights_names())


def _weights_names() -> list[str]:
    return [name for kind in ADAPTERS.values() for name in (kind.files.weights, *kind.others)]


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = (*_weights_names(), *_ORIGINAL)
    name = next((name for name in names if (path / name).is_file()), None)
    if name is None:
        raise AdapterError(f"{path}: contains no adapter; expected one of {', '.join(names)}")
    return path / name


def _kind_of(path: Path, names: Sequence[str]) -> str:
    """The type of adapter that all these tensors belong to."""
    for kind, adapter in ADAPTERS.items():
        others = [name for name in names if not adapter.files.owns(name)]
        if len(others) == len(names):
            continue
        if others:
            raise AdapterError(f"{path}: {len(others)} tensors are not of a {kind} adapter: {capped(others)}")
        return kind
    shown = f"contains {capped(names)}" if names else "is empty"
    marks = " or ".join(f"*{mark}*" for adapter in ADAPTERS.values() for mark in adapter.files.marks)
    raise AdapterError(f"{path}: no adapter: {shown}; expected tensors {marks}")
