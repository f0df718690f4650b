"""Adapters of any type: attach to a network, save, read those of this project, of `peft` and of the original code."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from mindspore import Parameter, Tensor

from glm_ms.convert.names import is_parameter
from glm_ms.convert.reader import CheckpointReader, open_checkpoint
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import GLMNetwork
from glm_ms.peft import ADAPTERS, weights_files
from glm_ms.spelling import argument, given
from glm_ms.storage.errors import CheckpointError, capped
from glm_ms.storage.fingerprint import weights_fingerprint
from glm_ms.storage.integrity import check_listed, position_beside
from glm_ms.storage.run_folder import WEIGHT_ENDINGS, resolve_checkpoint


class AdapterError(CheckpointError):
    """An adapter cannot be built, read, or does not belong to its network; the message names file and remedy."""


class AdapterConfig(Protocol):
    """Settings of an adapter: a frozen dataclass, whose `kind` is a key of `ADAPTERS`."""

    kind: ClassVar[str]

    @property
    def dropout(self) -> float:
        """Probability of zero in training."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that has been read.

    Attributes:
        path: its file.
        config: its settings; the dropout matters only if it is trained further.
        tensors: name of the parameter -> float32 array.
        weights_beside: number of tensors of a base in the same file, which an adapter does not use.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    weights_beside: int = 0

    @property
    def modules(self) -> list[str]:
        """Names of the linear layers a LoRA adapter changes, in the order of the file."""
        return list(dict.fromkeys(name.rpartition(".lora_")[0] for name in self.tensors if ".lora_" in name))

    @property
    def norm(self) -> float:
        """Root of the sum of squares over all tensors."""
        return float(np.sqrt(sum(np.square(t, dtype=np.float64).sum() for t in self.tensors.values())))


class Adapter(ABC):
    """Trainable float32 parameters on a network. A subclass for each type in `ADAPTERS` fills `_parameters`.

    Args:
        network: gets the adapter.
        config: its settings, of `config_class`.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, network: GLMNetwork, config: Any) -> None:
        self.network, self.config = network, config
        self._parameters: dict[str, Parameter] = {}

    @classmethod
    @abstractmethod
    def attach(cls, network: GLMNetwork, config: Any, seed: int, stored: StoredAdapter | None) -> Adapter:
        """Attaches an adapter with random values; `stored` gives the structure, as far as the config does not.

        Raises:
            AdapterError: the adapter does not fit the network, which is unchanged then.
        """

    @abstractmethod
    def detach(self) -> None:
        """Removes the cells of the adapter from the network."""

    @classmethod
    @abstractmethod
    def stored_config(cls, path: Path, tensors: Mapping[str, np.ndarray]) -> Any:
        """Settings of a stored adapter, from its tensors and the files beside them; AdapterError if not supported."""

    @classmethod
    def lacks_alpha(cls, path: Path) -> bool:
        """Whether a stored adapter is read with `lora_alpha` only, because its files do not have it."""
        return False

    @classmethod
    @abstractmethod
    def write_config(cls, folder: Path, config: Any, network: GLMConfig, base_model: str) -> None:
        """Writes the file that describes an adapter into an existing folder; `base_model` is the path of its base."""

    @classmethod
    @abstractmethod
    def shapes(cls, config: Any, network: GLMConfig, base: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the parameters of an adapter on a network whose parameters have the shapes `base`."""

    @classmethod
    def differences(cls, stored: StoredAdapter, wanted: Any, network: GLMNetwork) -> list[str]:
        """Settings that differ between a stored adapter and `wanted`, and so forbid further training; as messages."""
        return [
            f"model.pet_config.{key}: {getattr(wanted, field)}, in the adapter {getattr(stored.config, field)}"
            for key, field in ADAPTERS[cls.kind].keys.items()
            if field != "dropout" and getattr(stored.config, field) != getattr(wanted, field)
        ]

    @classmethod
    def renewed(cls, then: Any, wanted: Any) -> Any:
        """The config of a stored adapter with the values of the settings, for further training.

        Values that say the same may be spelled in another way, such as the order of target modules.
        """
        return dataclasses.replace(
            then, **{field: getattr(wanted, field) for field in ADAPTERS[cls.kind].keys.values()}
        )

    @classmethod
    def plain_name(cls, stored: str) -> str:
        """Name of a parameter, from its name in a file."""
        return stored.removeprefix(ADAPTERS[cls.kind].files.prefix)

    def parameters(self) -> list[Parameter]:
        """The parameters that are trained and saved, float32."""
        return list(self._parameters.values())

    def assign(self, tensors: Mapping[str, np.ndarray], source: Path) -> None:
        """Overwrites every parameter with the float32 array of its name; `source` is named in errors.

        Raises:
            AdapterError: a tensor is missing or unexpected, has another shape, or contains NaN or infinity.
        """
        check_tensors(tensors, {name: tuple(p.shape) for name, p in self._parameters.items()}, source)
        for name, parameter in self._parameters.items():
            parameter.set_data(Tensor(np.ascontiguousarray(tensors[name], np.float32)))

    def restore(self, folder: Path) -> None:
        """Overwrites every parameter with what `save` has written; CheckpointError if it is damaged or does not fit."""
        path = folder / ADAPTERS[self.kind].files.weights
        with open_checkpoint(path) as reader:
            tensors = {self.plain_name(name): reader.read(name, "float32") for name in reader.names()}
        self.assign(tensors, path)

    def save(self, folder: Path, base_model: str = "") -> None:
        """Writes the tensors and the file that describes them into an existing folder; see `write_config`."""
        files = ADAPTERS[self.kind].files
        shapes = {files.stored(name): tuple(parameter.shape) for name, parameter in self._parameters.items()}
        arrays = (parameter.asnumpy() for parameter in self._parameters.values())
        write_safetensors(folder / files.weights, shapes, "float32", arrays, {"format": "pt"})
        self.write_config(folder, self.config, self.network.config, base_model)


def check_tensors(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Compares the tensors of an adapter with the names and shapes that a network needs.

    Raises:
        AdapterError: a tensor is missing or unexpected, has another shape, or contains NaN or infinity.
    """
    problems = [f"{name}: missing" for name in shapes if name not in tensors]
    for name, value in tensors.items():
        if name not in shapes:
            problems.append(f"{name}: not expected here")
        elif tuple(value.shape) != tuple(shapes[name]):
            problems.append(f"{name}: shape {list(value.shape)}, this network needs {list(shapes[name])}")
        elif not np.isfinite(value).all():
            problems.append(f"{name}: contains NaN or infinity")
    if problems:
        separator = "\n    "
        raise AdapterError(
            f"{source}: the adapter does not fit this network; was it made for another base?"
            f"{separator}{capped(problems, separator)}"
        )


def has_adapter(network: GLMNetwork) -> bool:
    """Whether an adapter is attached to a network."""
    updated = any(linear.lora is not None for linear in network.linears().values())
    return updated or network.transformer.prefix_encoder is not None


def attach(network: GLMNetwork, config: AdapterConfig, seed: int = 0, stored: StoredAdapter | None = None) -> Adapter:
    """Attaches an adapter with random values of `seed` and freezes the rest of a network.

    A stored adapter gives the structure; its values are assigned with `Adapter.assign`.

    Raises:
        AdapterError: the adapter does not fit the network, or the network has an adapter already.
    """
    if has_adapter(network):
        raise AdapterError("this network has an adapter already; load the base again for another one")
    adapter = ADAPTERS[config.kind].load().attach(network, config, seed, stored)
    own = {id(parameter) for parameter in adapter.parameters()}
    for parameter in network.get_parameters():
        parameter.requires_grad = id(parameter) in own
    return adapter


def read_adapter(path: str | Path, lora_alpha: float | None = None) -> StoredAdapter:
    """Reads an adapter.

    Args:
        path: a folder of this project or of `peft` (`adapter_config.json`, `adapter_model.safetensors` or .bin), a
            checkpoint of MindFormers with LoRA or P-Tuning tensors, a P-Tuning checkpoint of the original code, the
            output folder of a run, or the file of weights itself. The base may be in the same files.
        lora_alpha: of the training, for LoRA tensors without `adapter_config.json`, as MindFormers saves them.

    Raises:
        AdapterError: there is none, it is empty, damaged, or of a type that cannot be used.
    """
    try:
        path = _weights_file(resolve_checkpoint(path))
        with open_checkpoint(path) as reader:
            adapter = ADAPTERS[_kind_of(path, reader.names())]
            kind, names = adapter.load(), [name for name in reader.names() if adapter.files.owns(name)]
            tensors = {kind.plain_name(name): reader.read(name, "float32") for name in names}
            if len(tensors) < len(names):
                raise AdapterError(f"{path}: {len(names) - len(tensors)} tensors are stored under two names")
            beside = len(reader.names()) - len(names)
            path = reader.file(names[0])
        check_listed(path.parent / adapter.files.config, added=True)
        if lora_alpha is None:
            config = kind.stored_config(path, tensors)
        elif kind.kind == "lora":
            config = kind.stored_config(path, tensors, lora_alpha=lora_alpha)  # type: ignore[call-arg]
        else:
            other = ", or correct model.pet_config.pet_type in the YAML" if "." in argument("lora_alpha") else ""
            raise AdapterError(
                f"{path}: {given('lora_alpha', f'{lora_alpha:g}')} was given, but this is a {kind.kind} adapter; leave "
                f"it out{other}"
            )
    except AdapterError:
        raise
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    return StoredAdapter(path, config, tensors, beside)


def kind_of(path: str | Path) -> str:
    """The kind of a stored adapter, a key of `ADAPTERS`. Raises AdapterError as `lacks_alpha`."""
    path = _weights_file(resolve_checkpoint(path))
    with open_checkpoint(path) as reader:
        return _kind_of(path, reader.names())


def lacks_alpha(path: str | Path) -> bool:
    """Whether an adapter is LoRA whose files do not have its `lora_alpha`, so that `read_adapter` needs it.

    Raises AdapterError as `read_adapter`, as far as the names of tensors tell.
    """
    path = _weights_file(resolve_checkpoint(path))
    with open_checkpoint(path) as reader:
        adapter = ADAPTERS[_kind_of(path, reader.names())].load()
        own = next(name for name in reader.names() if ADAPTERS[adapter.kind].files.owns(name))
        return adapter.lacks_alpha(reader.file(own))


def adapter_with(reader: CheckpointReader, named: str | Path | None) -> str | Path | None:
    """The adapter that belongs to weights: the one that the user has named, else that in the files of the weights."""
    return named or (reader.path if reader.adapter_names() else None)


def replaced_adapter(reader: CheckpointReader, named: str | Path | None) -> str:
    """A line for the user if `named` replaces an adapter in the files of the weights; empty without one."""
    own = [path.resolve() for path in (reader.path, reader.path.parent, *reader.files())]
    if not named or not reader.adapter_names() or resolve_checkpoint(named).resolve() in own:
        return ""
    return f"note: {reader.path} contains an adapter too; {named} is used in its place"


def base_remark(adapter: str | Path, base: str | Path) -> str:
    """A line for the user if an adapter of this project was trained on other weights than `base`; else empty.

    Not an error: the fingerprint also changes if the same weights are stored in another format. `adapter` is a path
    that `read_adapter` takes, `base` one that `open_checkpoint` takes, or the output folder of a run.
    """
    adapter, base = resolve_checkpoint(adapter), resolve_checkpoint(base)
    then = position_beside(adapter).get("base_weights")
    if then is None or then == weights_fingerprint(base):
        return ""
    return (
        f"note: {adapter if adapter.is_dir() else adapter.parent} was trained on other weights than {base}, or on the "
        "same in another format; unless they were only converted, the adapter does not fit them"
    )


def _weights_file(path: Path) -> Path:
    """The file or folder to read: the adapter's file in a folder that has one, else the whole folder."""
    names = weights_files()
    found = next((path / name for name in names if (path / name).is_file()), None)
    inside = list(path.iterdir()) if path.is_dir() else [path]
    if found is None and not any(item.suffix in WEIGHT_ENDINGS or item.match("rank_*") for item in inside):
        raise AdapterError(f"{path}: contains no adapter; expected one of {', '.join(names)}")
    return found or path


def _kind_of(path: Path, names: Sequence[str]) -> str:
    """The type of adapter in a file, whose other tensors must be those of a whole base."""
    whole = path.name not in weights_files() and "transformer.output_layer.weight" in names
    for kind, adapter in ADAPTERS.items():
        others = [name for name in names if not adapter.files.owns(name)]
        if len(others) == len(names):
            continue
        foreign = [name for name in others if not (whole and is_parameter(name))]
        if foreign:
            raise AdapterError(f"{path}: {len(foreign)} tensors are not of a {kind} adapter: {capped(foreign)}")
        return kind
    shown = f"contains {capped(names)}" if names else "is empty"
    if whole:
        shown = "contains the weights of a network"
    marks = " or ".join(f"*{mark}*" for adapter in ADAPTERS.values() for mark in adapter.files.marks)
    raise AdapterError(f"{path}: no adapter: {shown}; expected tensors {marks}")
