"""Files of an adapter, and files that describe the tensors of a checkpoint (companions)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import differing_keys
from glm_ms.storage.readers import read_object

CONFIG = "config.json"
OPTIMIZER = "optimizer.safetensors"
# Paths of base weights may differ between servers and do not describe the tensors.
_PATHS = ("base_model_name_or_path", "_name_or_path")


@dataclass(frozen=True)
class AdapterFiles:
    """Files of one kind of adapter.

    Attributes:
        config: file that describes the adapter.
        weights: file of its tensors.
        prefix: of the names in that file.
        marks: every tensor name contains one of these.
    """

    config: str
    weights: str
    prefix: str
    marks: tuple[str, ...]

    def owns(self, name: str) -> bool:
        """Whether a name, without prefix, can be that of a tensor of such an adapter."""
        return any(mark in name for mark in self.marks)

    def stored(self, name: str) -> str:
        """Name of a tensor in the file."""
        return f"{self.prefix}{name}"


# As in the library `peft`, and in the original P-Tuning v2 code.
LORA = AdapterFiles("adapter_config.json", "adapter_model.safetensors", "base_model.model.", (".lora_A.", ".lora_B."))
PREFIX = AdapterFiles(CONFIG, "prefix_encoder.safetensors", "", ("transformer.prefix_encoder.",))
KINDS = (LORA, PREFIX)
COMPANIONS = (CONFIG, LORA.config)


def adapter_files_of(names: Collection[str]) -> AdapterFiles | None:
    """The kind of adapter to which all these tensors belong, or None."""
    return next((kind for kind in KINDS if names and all(kind.owns(name) for name in names)), None)


def plain_name(file: Path, stored: str) -> str:
    """Name of a parameter in the network, from that in a file."""
    return stored.removeprefix(LORA.prefix) if file.name == LORA.weights else stored


def read_companions(folder: Path) -> dict[str, bytes]:
    """File name -> content of the companions in a folder.

    Raises:
        CheckpointError: a file cannot be read or is not a JSON object.
    """
    found = {}
    for path in (folder / name for name in COMPANIONS):
        if path.is_file():
            _document(path)
            found[path.name] = path.read_bytes()
    return found


def common_companions(folders: Mapping[int, Path]) -> dict[str, bytes]:
    """Companions of all ranks, which must be equal except for paths.

    Args:
        folders: rank -> folder of its tensors.

    Raises:
        CheckpointError: two ranks differ, or a file is damaged.
    """
    common: dict[str, tuple[Path, bytes]] = {}
    for folder in folders.values():
        for name, content in read_companions(folder).items():
            first, _ = common.setdefault(name, (folder / name, content))
            keys = differing_keys(_document(first), _document(folder / name))
            if keys:
                raise CheckpointError(
                    f"{folder / name}: differs from {first} in {', '.join(keys)}; the slices are of different runs"
                )
    return {name: content for name, (_, content) in common.items()}


def _document(path: Path) -> dict[str, Any]:
    document = read_object(path, CheckpointError)
    return {key: value for key, value in document.items() if key not in _PATHS}
