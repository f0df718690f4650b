"""LoRA: low-rank updates beside frozen linear layers. Hu et al. 2021, arXiv:2106.09685.

Names, shapes and files are those of the Hugging Face library `peft`, which loads what is saved here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.convert.adapter_files import LORA
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import DROPOUTS_PER_BLOCK, GLMNetwork
from glm_ms.ops.portable import SeededDropout
from glm_ms.peft import MAX_LORA_ALPHA
from glm_ms.peft.adapter import Adapter, AdapterError, StoredAdapter
from glm_ms.spelling import argument, given
from glm_ms.storage.errors import capped
from glm_ms.storage.readers import read_object

A, B = "lora_A.weight", "lora_B.weight"
# Keys of an adapter_config.json that are used, see `_read_config`.
_USED = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
     "layers_to_transform", "layers_pattern", "init_lora_weights"}
)  # fmt: skip
# Keys that do not change the function: bookkeeping, and details of what other keys turn on.
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
     "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
)  # fmt: skip
# First values of A and B that leave the base as it is. Others (PiSSA, OLoRA, LoftQ, CorDA, ...) change it.
_INITS = ("gaussian", "eva", "orthogonal")
# Targets of `peft` for ChatGLM if the file names none.
_DEFAULT_TARGETS = ("query_key_value",)
_EMBEDDING = "transformer.embedding.word_embeddings"
_LAYER = "number_of_the_layer"  # group in a pattern
_ALPHA = f"a number above 0 and at most {MAX_LORA_ALPHA:g}"
_NAMES = "a regular expression or a list of texts"
_SEPARATOR = "\n    "


@dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA: the update is B A alpha / rank, A [rank, in], B [out, rank].

    Args:
        dropout: probability of zero on the input of A while training.
        target_modules: a regular expression that must match the whole name of a module, or a list of names, each
            for all modules that end in it.
        use_rslora: the update is B A alpha / sqrt(rank) (rank-stabilised LoRA).
        exclude_modules: as `target_modules`, for modules without an update.
        layers_to_transform: numbers of the layers whose modules a list of `target_modules` means; None: all.
        layers_pattern: names before these numbers; empty: any.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: str | tuple[str, ...] = ".*query_key_value"
    use_rslora: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

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
        if stored is not None:
            check_modules(stored, linears)
        modules = target_names(config.target_modules, linears) if stored is None else stored.modules
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
    def lacks_alpha(cls, path: Path) -> bool:
        return _config_file(path) is None

    @classmethod
    def stored_config(
        cls, path: Path, tensors: Mapping[str, np.ndarray], lora_alpha: float | None = None
    ) -> LoraConfig:
        """Reads the `adapter_config.json` beside the file, or in the output folder of MindFormers above it.

        Without one the tensors give everything except `lora_alpha`, the numerator of the scale.
        """
        if lora_alpha is not None and not _is_alpha(lora_alpha):
            raise AdapterError(f"{path}: {given('lora_alpha', lora_alpha)}: must be {_ALPHA}")
        file = _config_file(path)
        if file is None and lora_alpha is not None:
            ranks = [value.shape[0] for name, value in tensors.items() if name.endswith(A) and value.ndim == 2]
            modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors)
            config = LoraConfig(ranks[0] if ranks else 0, lora_alpha, 0.0, tuple(modules))
        else:
            config = _read_config(file or path.parent / LORA.config)
        if lora_alpha not in (None, config.alpha):
            raise AdapterError(
                f"{file}: lora_alpha = {config.alpha:g}, but {given('lora_alpha', f'{lora_alpha:g}')} was given; "
                "they must be equal"
            )
        for name, value in tensors.items():
            rank = value.shape[0 if name.endswith(A) else -1] if value.ndim == 2 else None
            if rank != config.rank:
                found = f"{name} has shape {list(value.shape)}"
                reason = f"but {LORA.config} says r = {config.rank}" if file else f"others have rank {config.rank}"
                raise AdapterError(f"{path}: {found}, {reason}")
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
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(config, key)
            if value:
                document[key] = value if isinstance(value, str) else list(value)
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

    @classmethod
    def renewed(cls, then: LoraConfig, wanted: LoraConfig) -> LoraConfig:
        """`target_modules` of the settings alone select the modules, the same ones."""
        config = super().renewed(then, wanted)
        return dataclasses.replace(config, exclude_modules=(), layers_to_transform=None, layers_pattern=())


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
        except (re.error, OverflowError, RecursionError) as error:
            reason = f"is not a regular expression: {error}"
            raise AdapterError(f"target_modules: {target_modules!r} {reason}") from None
        missing = [] if found else [target_modules]
    else:
        found = [name for name in names if _ends_in(name, target_modules)]
        missing = [end for end in dict.fromkeys(target_modules) if not any(_ends_in(name, [end]) for name in names)]
    if missing:
        modules = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names)
        raise AdapterError(
            f"target_modules: {', '.join(map(repr, missing))} matches no module; a text is a regular expression for "
            f"the whole name, a list gives endings of names. Modules: {', '.join(modules)}"
        )
    return found


def promised_modules(config: LoraConfig, names: Iterable[str]) -> list[str]:
    """Names of the modules for which an adapter has tensors according to its config, by the rules of `peft`.

    `names` are those of the linear layers; the embedding counts too, but not for a pattern that matches the modules
    around it, as `.*`, which `peft` cannot train.

    A list that names no module is read as MindFormers writes it: regular expressions for the start of the last part of
    a name.
    """
    names, targets = list(names), config.target_modules
    if not isinstance(targets, str) or not re.fullmatch(targets, _EMBEDDING.rpartition(".")[0]):
        names.append(_EMBEDDING)
    if isinstance(targets, str) or any(_ends_in(name, targets) for name in names):
        return [name for name in names if _is_target(config, name)]
    ends = [(name, name.rpartition(".")[2]) for name in names if name != _EMBEDDING]
    return [name for name, end in ends if any(_is_pattern(item) and re.match(item, end) for item in targets)]


def _is_pattern(text: str) -> bool:
    """Whether a text is a regular expression, also between those of `_is_target`."""
    try:
        re.compile(rf"{text}(?P<{_LAYER}>)")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_target(config: LoraConfig, name: str) -> bool:
    targets, excluded = config.target_modules, config.exclude_modules
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends_in(name, excluded):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets or not _ends_in(name, targets) or config.layers_to_transform is None:
        return _ends_in(name, targets)
    patterns = config.layers_pattern or (r"[^.]*",)
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<{_LAYER}>\d+)\.", name) for pattern in patterns)
    # As in `peft`, the first pattern that matches decides.
    found = next((match[_LAYER] for match in matches if match is not None), None)
    return found is not None and int(found) in config.layers_to_transform


def _ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in endings)


def check_modules(stored: StoredAdapter, names: Iterable[str]) -> None:
    """As `check_complete`, and the network must have all modules of the adapter."""
    names = list(names)
    unknown = [name for name in stored.modules if name not in names]
    if unknown:
        reason = f"this network has no linear layers {capped(unknown)}"
        raise AdapterError(f"{stored.path}: made for another base: {reason}")
    check_complete(stored, names)


def check_complete(stored: StoredAdapter, names: Iterable[str]) -> None:
    """Compares the tensors of an adapter with what its config promises for a network with the linear layers `names`.

    Raises:
        AdapterError: tensors are missing or unexpected; the message lists them.
    """
    if not isinstance(stored.config, LoraConfig):
        return
    promised = promised_modules(stored.config, names)
    wanted = [f"{module}.{ending}" for module in promised for ending in (A, B)]
    problems = [f"{name}: missing" for name in wanted if name not in stored.tensors]
    problems += [f"{name}: not named by target_modules" for name in stored.modules if name not in promised]
    if problems:
        raise AdapterError(
            f"{stored.path}: does not fit the target_modules of its {LORA.config}: the file is incomplete (saved by "
            "one rank only, or by DeepSpeed ZeRO-3 without gathering), or the adapter was made for another base"
            f"{_SEPARATOR}{capped(problems, _SEPARATOR)}"
        )


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
    check_effect(stored)
    return deltas


def check_effect(stored: StoredAdapter) -> None:
    """Raises AdapterError if LoRA tensors change nothing."""
    if not any(stored.tensors[f"{module}.{B}"].any() for module in stored.modules):
        raise AdapterError(f"{stored.path}: every lora_B is zero, so this adapter changes nothing; was it trained?")


def _product(b: np.ndarray, a: np.ndarray, factor: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # the reader of the base refuses what is not finite
        return (b @ a) * np.float32(factor)


def _config_file(path: Path) -> Path | None:
    """The `adapter_config.json` of a file of tensors; None if there is none.

    MindFormers saves it in OUTPUT, the tensors in OUTPUT/checkpoint/rank_N.
    """
    folders = [path.parent]
    if path.parent.name.startswith("rank_"):
        folders.append(path.parent.parent.parent)
    return next((folder / LORA.config for folder in folders if (folder / LORA.config).is_file()), None)


def _read_config(path: Path) -> LoraConfig:
    """Reads an `adapter_config.json`; AdapterError for every value that cannot be reproduced exactly."""
    where = ", in a YAML beside pet_type: lora" if "." in argument("lora_alpha") else ""
    remedy = (
        "missing; without it the scale of the adapter is not known; copy it here, or give the lora_alpha of its "
        f"training ({given('lora_alpha', 'ALPHA')}{where})"
    )
    document = read_object(path, AdapterError, remedy)
    if document.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {document.get('peft_type')!r}: only LORA is supported")
    for key, value in document.items():
        neutral = value in ({}, [], "") or value is None or value is False or (key, value) == ("bias", "none")
        if not neutral and key not in _USED | _WITHOUT_EFFECT:
            raise AdapterError(
                f"{path}: {key} = {value!r}: not supported, because it can change what the adapter computes; merge the "
                "adapter with peft (merge_and_unload)"
            )

    def get(key: str, expected: str, fits: Callable[[Any], bool], default: Any = None) -> Any:
        value = document.get(key)
        if not (value is None and key not in ("r", "lora_alpha")) and not fits(value):
            raise AdapterError(f"{path}: {key} = {value!r}: must be {expected}")
        return default if value is None else value

    get(
        "init_lora_weights",
        f"true, false or one of {', '.join(_INITS)}: others change the base weights",
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value.lower() in _INITS),
    )
    targets = get("target_modules", _NAMES, _is_names, _DEFAULT_TARGETS)
    layers = get("layers_to_transform", "a whole number or a list of them", _is_layers)
    pattern = get(
        "layers_pattern", _NAMES, lambda v: _is_names(v) and (isinstance(v, str) or all(map(_is_pattern, v))), ()
    )
    if (layers is not None and isinstance(targets, str)) or (pattern and layers is None):
        raise AdapterError(
            f"{path}: layers_to_transform needs a list in target_modules, layers_pattern needs layers_to_transform"
        )
    return LoraConfig(
        rank=get("r", "a positive whole number", lambda value: type(value) is int and value >= 1),
        alpha=float(get("lora_alpha", _ALPHA, _is_alpha)),
        dropout=float(get("lora_dropout", "at least 0 and below 1", lambda v: _is_number(v) and 0 <= v < 1, 0.0)),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        use_rslora=get("use_rslora", "true or false", lambda value: isinstance(value, bool), False),
        exclude_modules=_texts(get("exclude_modules", _NAMES, _is_names, ())),
        layers_to_transform=None if layers in (None, []) else tuple(layers if isinstance(layers, list) else [layers]),
        layers_pattern=(pattern,) if isinstance(pattern, str) and pattern else tuple(pattern),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= MAX_LORA_ALPHA


def _is_names(value: Any) -> bool:
    return (isinstance(value, str) and _is_pattern(value)) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _is_layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(item) is int for item in value))


def _texts(value: Any) -> Any:
    """A regular expression, or names; empty for no module."""
    return value if isinstance(value, str) and value else tuple(value)
