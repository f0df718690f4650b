"""Adapters on disk: those of this project, of `peft`, and the P-Tuning checkpoints of the original code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_ms.convert.reader import open_checkpoint
from glm_ms.peft import lora, ptuning
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.lora import LoraConfig
from glm_ms.peft.ptuning import PrefixConfig, prefix_config_of
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.readers import read_object
from glm_ms.storage.run_folder import resolve_checkpoint

# What a folder may hold, the surest sign first. The original P-Tuning code saves its encoder as the last two.
_FOLDER_CONTENT = (
    lora.WEIGHTS_FILE, "adapter_model.bin", ptuning.WEIGHTS_FILE, "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
# Settings of `peft` that change the function and are not computed here -> their neutral values.
_NEUTRAL = {
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that has been read.

    Attributes:
        path: its file.
        config: LoRA or P-Tuning; its dropout counts in further training only.
        tensors: name -> float32 array; LoRA without the prefix of `peft`.
    """

    path: Path
    config: LoraConfig | PrefixConfig
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
        AdapterError: there is none, it is empty, damaged, or of a kind that cannot be used.
    """
    try:
        path = _weights_file(resolve_checkpoint(path))
        with open_checkpoint(path) as reader:
            tensors = {name: reader.read(name, "float32") for name in _adapter_names(path, reader.names())}
    except AdapterError:
        raise
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    if any(name.startswith(ptuning.HF_PREFIX) for name in tensors):
        return StoredAdapter(path, prefix_config_of(tensors, path), tensors)
    tensors = {_lora_name(name): value for name, value in tensors.items()}
    config = _lora_config(path.parent / lora.CONFIG_FILE)
    _check_ranks(path, config, tensors)
    return StoredAdapter(path, config, tensors)


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of this project or of `peft`, and so no base weights."""
    return any((path / name).is_file() for name in _FOLDER_CONTENT[:3])


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    name = next((name for name in _FOLDER_CONTENT if (path / name).is_file()), None)
    if name is None:
        raise AdapterError(f"{path}: holds no adapter; expected one of {', '.join(_FOLDER_CONTENT)}")
    return path / name


def _adapter_names(path: Path, names: list[str]) -> list[str]:
    """All names of an adapter, of one kind; anything else is an error."""
    prefix = [name for name in names if name.startswith(ptuning.HF_PREFIX)]
    low_rank = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    found = prefix or low_rank
    if not found:
        shown = f"holds {capped(names)}" if names else "is empty"
        raise AdapterError(
            f"{path}: no adapter: {shown}; expected lora_A and lora_B, or {ptuning.HF_PREFIX}*"
        )
    others = [name for name in names if name not in set(found)]
    if others:
        raise AdapterError(f"{path}: {len(others)} tensors that this adapter cannot have: {capped(others)}")
    return found


def _lora_name(stored: str) -> str:
    """The name of a module and its A or B: `peft` puts its own prefix, and in memory the adapter's name, around."""
    name = stored.removeprefix(lora.HF_PREFIX)
    for middle in (".lora_A.", ".lora_B."):
        module, found, ending = name.rpartition(middle)
        if found:
            return f"{module}{middle}{ending.rpartition('.')[2]}"
    return name


def _lora_config(path: Path) -> LoraConfig:
    document = read_object(path, AdapterError, "missing; without it the scale of the adapter is not known")
    if document.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {document.get('peft_type')!r}: only LORA can be used")
    for key, neutral in _NEUTRAL.items():
        if key in document and document[key] not in neutral:
            raise AdapterError(f"{path}: {key} = {document[key]!r}: such an adapter cannot be used")
    try:
        targets = document.get("target_modules") or []
        if not (int(document["r"]) >= 1 and 0 < float(document["lora_alpha"]) < math.inf):
            raise ValueError(f"r = {document['r']}, lora_alpha = {document['lora_alpha']}")
        return LoraConfig(
            rank=int(document["r"]),
            alpha=float(document["lora_alpha"]),
            dropout=float(document.get("lora_dropout") or 0),
            target_modules=targets if isinstance(targets, str) else tuple(sorted(map(str, targets))),
            use_rslora=bool(document.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: r and lora_alpha must be positive numbers: {error!r}") from None


def _check_ranks(path: Path, config: LoraConfig, tensors: dict[str, np.ndarray]) -> None:
    for name, value in tensors.items():
        rank = value.shape[0 if name.endswith(lora.A) else -1] if value.ndim == 2 else None
        if rank != config.rank:
            raise AdapterError(
                f"{path}: {name} has shape {list(value.shape)}, but {lora.CONFIG_FILE} says r = {config.rank}"
            )
