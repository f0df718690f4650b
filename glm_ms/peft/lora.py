"""LoRA: low-rank updates beside frozen linear layers. Hu et al. 2021, arXiv:2106.09685.

Names, shapes and files are those of the Hugging Face library `peft`, which loads what is saved here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.convert.adapter_files import LORA
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import DROPOUTS_PER_BLOCK, GLMNetwork
from glm_ms.ops.portable import SeededDropout
from glm_ms.peft.adapter import Adapter, AdapterError, StoredAdapter
from glm_ms.storage.errors import capped
from glm_ms.storage.readers import read_object

A, B = "lora_A.weight", "lora_B.weight"
# Settings of `peft` that change the function and are not supported -> their neutral values.
_NEUTRAL: dict[str, tuple] = {
    "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None), "modules_to_save": (None, []),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "layer_replication": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA: the update is B A alpha / rank, A [rank, in], B [out, rank].

    Args:
        dropout: probability of zero on the input of A while training.
        target_modules: a regular expression that must match the whole name of a module, or a list of names, each
            for all modules that end in it.
        use_rslora: the update is B A alpha / sqrt(rank) (rank-stabilised LoRA).
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: str | tuple[str, ...] = ".*query_key_value"
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LowRankUpdate(nn.Cell):
    """B A x times a factor, added to the result of `linear`. A [r, in] and B [out, r] are float32, the products of the
    compute type. A is drawn as torch.nn.Linear draws its weights; B starts as zeros, so that nothing is changed."""

    def __init__(self, linear: nn.Cell, config: LoraConfig, stream: int, generator: np.random.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)
        a = generator.uniform(-bound, bound, (config.rank, linear.in_features)).astype(np.float32)
        self.a = Parameter(Tensor(a))
        self.b = Parameter(Tensor(np.zeros((linear.out_features, config.rank), np.float32)))
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.dtype
        self.scaling = config.scaling
        self.dropout = SeededDropout(config.dropout, stream) if config.dropout > 0 else None
        self.down, self.up = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.scale, self.reshape = ops.Mul(), ops.Reshape()
        self.cast_down, self.cast_up, self.cast = ops.Cast(), ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """x [B, ..., in] of the compute type, seeds int32 [B] or None for no dropout -> [B, ..., out];
        or x [B * S, in] -> [B * S, out]."""
        shape = ops.shape(x)
        if self.dropout is not None and seeds is not None:
            x = self.dropout(self.reshape(x, (ops.shape(seeds)[0], -1, self.in_features)), seeds)
        y = self.down(self.reshape(x, (-1, self.in_features)), self.cast_down(self.a, self.dtype))
        y = self.scale(self.up(y, self.cast_up(self.b, self.dtype)), self.cast(self.scaling, self.dtype))
        return self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +


class LoraAdapter(Adapter):
    """LoRA on linear layers of a network."""

    kind = "lora"
    config_class = LoraConfig

    @classmethod
    def attach(cls, network: GLMNetwork, config: LoraConfig, seed: int, stored: StoredAdapter | None) -> LoraAdapter:
        """Without a stored adapter `config.target_modules` selects the modules."""
        linears = network.linears()
        modules = target_names(config.target_modules, linears) if stored is None else stored.modules
        unknown = [name for name in modules if name not in linears]
        if stored is not None and unknown:
            reason = f"this network has no linear layers {capped(unknown)}"
            raise AdapterError(f"{stored.path}: made for another base: {reason}")
        adapter, generator = cls(network, config), np.random.default_rng(seed)
        first_stream = network.config.num_layers * DROPOUTS_PER_BLOCK
        for place, name in enumerate(modules):
            update = LowRankUpdate(linears[name], config, first_stream + place, generator)
            linears[name].lora = update
            for ending, parameter in ((A, update.a), (B, update.b)):
                parameter.name = f"{name}.{ending}"  # MindSpore has named it by its place in the layer
                adapter._parameters[parameter.name] = parameter
        return adapter

    def detach(self) -> None:
        for linear in self.network.linears().values():
            linear.lora = None

    @classmethod
    def plain_name(cls, stored: str) -> str:
        """`peft` adds its prefix, and in memory the adapter's name, to a module and its A or B."""
        name = super().plain_name(stored)
        for middle in LORA.marks:
            module, found, ending = name.rpartition(middle)
            if found:
                return f"{module}{middle}{ending.rpartition('.')[2]}"
        return name

    @classmethod
    def stored_config(cls, path: Path, tensors: Mapping[str, np.ndarray]) -> LoraConfig:
        """Reads the `adapter_config.json` beside the file."""
        config = _read_config(path.parent / LORA.config)
        for name, value in tensors.items():
            rank = value.shape[0 if name.endswith(A) else -1] if value.ndim == 2 else None
            if rank != config.rank:
                found = f"{name} has shape {list(value.shape)}"
                raise AdapterError(f"{path}: {found}, but {LORA.config} says r = {config.rank}")
        return config

    @classmethod
    def write_config(cls, folder: Path, config: LoraConfig, network: GLMConfig, base_model: str) -> None:
        """Writes the `adapter_config.json` of `peft`."""
        targets = config.target_modules
        document = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
            "inference_mode": True, "r": config.rank,
            "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets), "bias": "none",
            "fan_in_fan_out": False, "use_rslora": config.use_rslora, "modules_to_save": None,
        }  # fmt: skip
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (folder / LORA.config).write_text(text, encoding="utf-8")

    @classmethod
    def shapes(
        cls, config: LoraConfig, network: GLMConfig, base: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """`base` is of a network that is not sharded."""
        found: dict[str, tuple[int, ...]] = {}
        for module in target_names(config.target_modules, linear_names(base)):
            rows, columns = base[f"{module}.weight"]
            found.update({f"{module}.{A}": (config.rank, columns), f"{module}.{B}": (rows, config.rank)})
        return found

    @classmethod
    def differences(cls, stored: StoredAdapter, wanted: LoraConfig, network: GLMNetwork) -> list[str]:
        """Compares modules and not patterns: different patterns can select the same modules."""
        odd = sorted(set(target_names(wanted.target_modules, network.linears())) ^ set(stored.modules))
        keys = [line for line in super().differences(stored, wanted, network) if ".target_modules:" not in line]
        return keys + ([f"model.pet_config.target_modules: {capped(odd)} in only one of both"] if odd else [])


def linear_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the linear layers among parameters given by their shapes."""
    matrices = (name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight"))
    return [name.removesuffix(".weight") for name in matrices]


def target_names(target_modules: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """Names of the modules that get an update, in the order of the network.

    Raises:
        AdapterError: a pattern, or an ending, that matches no module; the message lists the modules.
    """
    names = list(names)
    if isinstance(target_modules, str):
        try:
            found = [name for name in names if re.fullmatch(target_modules, name)]
        except re.error as error:
            reason = f"is not a regular expression: {error}"
            raise AdapterError(f"target_modules: {target_modules!r} {reason}") from None
        missing = [] if found else [target_modules]
    else:
        found = [name for name in names if any(f".{name}".endswith(f".{end}") for end in target_modules)]
        endings = dict.fromkeys(target_modules)
        missing = [end for end in endings if not any(f".{name}".endswith(f".{end}") for name in names)]
    if missing:
        modules = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
        raise AdapterError(
            f"target_modules: {', '.join(map(repr, missing))} matches no module; a text is a regular expression for "
            f"the whole name, a list gives endings of names. Modules: {', '.join(modules)}"
        )
    return found


def lora_deltas(stored: StoredAdapter, remove: bool = False) -> dict[str, Callable[[], np.ndarray]]:
    """Name of each weight -> function that computes what merging adds to it, or with `remove` takes away again.

    The functions return float32 [out, in], as large as the weight.

    Raises:
        AdapterError: not LoRA, half a pair, or an adapter that changes nothing.
    """
    if not isinstance(stored.config, LoraConfig):
        raise AdapterError(f"{stored.path}: a P-Tuning prefix cannot be merged into weights; use it as an adapter")
    factor = -stored.config.scaling if remove else stored.config.scaling
    deltas: dict[str, Callable[[], np.ndarray]] = {}
    for module in stored.modules:
        a, b = (stored.tensors.get(f"{module}.{ending}") for ending in (A, B))
        if a is None or b is None:
            raise AdapterError(f"{stored.path}: {module} has only one of lora_A and lora_B")
        deltas[f"{module}.weight"] = partial(_product, b, a, factor)
    if not any(stored.tensors[f"{module}.{B}"].any() for module in stored.modules):
        raise AdapterError(f"{stored.path}: every lora_B is zero, so this adapter changes nothing; was it trained?")
    return deltas


def _product(b: np.ndarray, a: np.ndarray, factor: float) -> np.ndarray:
    return (b @ a) * np.float32(factor)


def _read_config(path: Path) -> LoraConfig:
    document = read_object(path, AdapterError, "missing; without it the scale of the adapter is not known")
    if document.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {document.get('peft_type')!r}: only LORA is supported")
    for key, neutral in _NEUTRAL.items():
        if key in document and document[key] not in neutral:
            raise AdapterError(f"{path}: {key} = {document[key]!r}: not supported")
    try:
        targets = document.get("target_modules") or []
        if not (int(document["r"]) >= 1 and 0 < float(document["lora_alpha"]) < math.inf):
            raise ValueError(f"r = {document['r']}, lora_alpha = {document['lora_alpha']}")
        targets = targets if isinstance(targets, str) else tuple(sorted(map(str, targets)))
        return LoraConfig(
            int(document["r"]), float(document["lora_alpha"]), float(document.get("lora_dropout") or 0), targets,
            bool(document.get("use_rslora", False))
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: r and lora_alpha must be positive numbers: {error!r}") from None
