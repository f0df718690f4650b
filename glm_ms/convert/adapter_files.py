"""Names of the files of an adapter, and of what may lie beside tensors to say what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import differing_keys
from glm_ms.storage.readers import decode_text, parse_object

CONFIG = "config.json"
OPTIMIZER = "optimizer.safetensors"
# Where the base weights were read: may differ from server to server, and says nothing of the tensors.
_PATHS = ("base_model_name_or_path", "_name_or_path")


@dataclass(frozen=True)
class AdapterFiles:
    """How an adapter of one kind is stored.

    Attributes:
        config: file that describes it.
        weights: file of its tensors.
        prefix: of the names in that file.
        marks: every name of a tensor contains one of these.
    """

    config: str
    weights: str
    prefix: str
    marks: tuple[str, ...]

    def owns(self, name: str) -> bool:
        """Whether a tensor, by its name without prefix, can be of such an adapter."""
        return any(mark in name for mark in self.marks)

    def stored(self, name: str) -> str:
        """The name of a tensor in the file."""
        return f"{self.prefix}{name}"


# Those of the library `peft`, and those of the original P-Tuning v2 code.
LORA = AdapterFiles(
    "adapter_config.json", "adapter_model.safetensors", "base_model.model.", (".lora_A.", ".lora_B.")
)
PREFIX = AdapterFiles(CONFIG, "prefix_encoder.safetensors", "", ("transformer.prefix_encoder.",))
KINDS = (LORA, PREFIX)
COMPANIONS = (CONFIG, LORA.config)


def adapter_files_of(names: Collection[str]) -> AdapterFiles | None:
    """The kind of adapter whose tensors these are, all of them; None if they are no adapter."""
    return next((kind for kind in KINDS if names and all(kind.owns(name) for name in names)), None)


def plain_name(file: Path, stored: str) -> str:
    """The name of a parameter in the network, from that in a file."""
    return stored.removeprefix(LORA.prefix) if file.name == LORA.weights else stored


def read_companions(folder: Path) -> dict[str, bytes]:
    """File name -> content of what describes the tensors of a folder, as far as it is there.

    Raises:
        CheckpointError: a file is unreadable or no JSON object.
    """
    found = {}
    for name in COMPANIONS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        _document(path, found[name])
    return found


def common_companions(folders: Mapping[int, Path]) -> dict[str, bytes]:
    """What describes the tensors of all ranks, which must say the same but for paths.

    Args:
        folders: rank -> folder of its tensors.

    Raises:
        CheckpointError: two ranks contradict one another, or a file is damaged.
    """
    common: dict[str, tuple[Path, bytes]] = {}
    for folder in folders.values():
        for name, content in read_companions(folder).items():
            first, known = common.setdefault(name, (folder / name, content))
            left, right = _document(first, known), _document(folder / name, content)
            keys = differing_keys(left, right)
            if keys:
                raise CheckpointError(
                    f"{folder / name}: differs from {first} in {', '.join(keys)}; the slices are of different runs"
                )
    return {name: content for name, (_, content) in common.items()}


def _document(path: Path, content: bytes) -> dict[str, Any]:
    document = parse_object(decode_text(content, path, CheckpointError), path, CheckpointError)
    return {key: value for key, value in document.items() if key not in _PATHS}
