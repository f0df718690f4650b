"""Files and names of an adapter, and files that describe the tensors of a checkpoint (companions)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.integrity import differing_keys
from glm_ms.storage.readers import read_object

CONFIG = "config.json"
# Paths of base weights may differ between servers and do not describe the tensors.
_PATHS = ("base_model_name_or_path", "_name_or_path")


@dataclass(frozen=True)
class AdapterFiles:
    """Files of one kind of adapter."""

    config: str  # file that describes the adapter
    weights: str  # file of its tensors
    prefix: str  # of the names in that file
    marks: tuple[str, ...]  # every tensor name contains one of these

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
_COMPANIONS = (CONFIG, LORA.config)


# Names that MindFormers (package mindpet) stores -> the names here. Its versions differ in case and `transformer.`.
_MINDFORMERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(.+)\.mindpet_delta_lora_[aA]", r"\1.lora_A.weight"),
        (r"(.+)\.mindpet_delta_lora_[bB]", r"\1.lora_B.weight"),
        (
            r"(?:transformer\.)?prefix_encoder\.mindpet_delta_ptuning2_embedding\.embedding_table",
            "transformer.prefix_encoder.embedding.weight",
        ),
        (
            r"(?:transformer\.)?prefix_encoder\.mindpet_delta_ptuning2_dense_in\.(weight|bias)",
            r"transformer.prefix_encoder.trans.0.\1",
        ),
        (
            r"(?:transformer\.)?prefix_encoder\.mindpet_delta_ptuning2_dense_out\.(weight|bias)",
            r"transformer.prefix_encoder.trans.2.\1",
        ),
    )
)
# The numbers 0, 1, 2, ... of the positions of a prefix.
PREFIX_POSITIONS = re.compile(r"(transformer\.)?prefix_encoder\.mindpet_delta_ptuning2_prefix")


def adapter_name(stored: str) -> str:
    """The name here of a tensor of an adapter that MindFormers has stored; other names are given as they are."""
    for pattern, name in _MINDFORMERS:
        match = pattern.fullmatch(stored)
        if match:
            return match.expand(name)
    return stored


def owner_of(name: str) -> AdapterFiles | None:
    """The kind of adapter to which a tensor belongs; None for one of the base."""
    return next((kind for kind in KINDS if kind.owns(name)), None)


def adapter_files_of(names: Collection[str]) -> AdapterFiles | None:
    """The kind of adapter to which all these tensors belong, or None."""
    return next((kind for kind in KINDS if names and all(kind.owns(name) for name in names)), None)


def plain_name(file: Path, stored: str) -> str:
    """Name of a parameter in the network, from that in a file."""
    return stored.removeprefix(LORA.prefix) if file.name == LORA.weights else stored


def of_all_ranks(folders: Sequence[Path], name: str) -> list[Path]:
    """The files called `name` in the folders of all ranks; none, or CheckpointError if only some ranks have it."""
    found = [folder / name for folder in folders if (folder / name).is_file()]
    lacking = [str(folder) for folder in folders if not (folder / name).is_file()]
    if found and lacking:
        raise CheckpointError(
            f"{found[0]}: {len(lacking)} of {len(folders)} ranks have no {name} ({capped(lacking)}): files are "
            "missing, or the slices are of different runs; fetch the folders of all ranks again"
        )
    return found


def common_companions(folders: Sequence[Path]) -> dict[str, bytes]:
    """File name -> content of the files that describe the tensors, which all ranks must share except for paths.

    Raises:
        CheckpointError: the folders of two ranks differ, some ranks only have a file, or a file cannot be read or is
            not a JSON object.
    """
    common: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in (path for name in _COMPANIONS for path in of_all_ranks(folders, name)):
        document = read_object(path, CheckpointError)
        first, expected = common.setdefault(path.name, (path, document))
        keys = [key for key in differing_keys(expected, document) if key not in _PATHS]
        if keys:
            raise CheckpointError(
                f"{path}: differs from {first} in {', '.join(keys)}; the slices are of different runs"
            )
    return {name: path.read_bytes() for name, (path, _) in common.items()}
