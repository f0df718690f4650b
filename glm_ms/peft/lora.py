"""LoRA: low-rank updates beside frozen linear layers. Hu et al. 2021, arXiv:2106.09685.

Names, shapes and files are those of the Hugging Face library `peft`, which loads what is saved here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from glm_ms.convert.adapter_files import LORA
from glm_ms.convert.safetensors_file import write_safetensors
from glm_ms.model.glm import DROPOUTS_PER_BLOCK, GLMNetwork
from glm_ms.model.layers import Linear
from glm_ms.ops.dropout import SeededDropout
from glm_ms.peft.errors import AdapterError
from glm_ms.peft.parameters import assign_all, stored_tensors

CONFIG_FILE, WEIGHTS_FILE, HF_PREFIX = LORA.config, LORA.weights, LORA.prefix
A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class LoraConfig:
    """What `pet_config` says of LoRA.

    Args:
        rank: rows of A and columns of B.
        alpha: the update is B A alpha / rank.
        dropout: probability of zero on the input of A while training.
        target_modules: a regular expression that must match the whole name of a module, or names, each standing for
            every module that ends in it.
        use_rslora: the update is B A alpha / sqrt(rank) (rank-stabilised LoRA).
    """

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
    """B A x times a factor. A [r, in] and B [out, r] are float32; the products have the compute type.

    Args:
        linear: the layer it stands beside.
        config: rank, factor, dropout.
        stream: of the dropout.
        generator: draws A as torch.nn.Linear draws its weights; B begins with zeros, so that nothing is changed.
    """

    def __init__(
        self, linear: Linear, config: LoraConfig, stream: int, generator: np.random.Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)
        a = generator.uniform(-bound, bound, (config.rank, linear.in_features)).astype(np.float32)
        self.a = Parameter(Tensor(a))
        self.b = Parameter(Tensor(np.zeros((linear.out_features, config.rank), np.float32)))
        self.in_features, self.out_features, self.dtype = (
            linear.in_features,
            linear.out_features,
            linear.dtype,
        )
        self.scaling = config.scaling
        self.dropout = SeededDropout(config.dropout, stream) if config.dropout > 0 else None
        self.down, self.up = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.scale = ops.Mul()
        self.reshape = ops.Reshape()
        self.cast_down, self.cast_up, self.cast = ops.Cast(), ops.Cast(), ops.Cast()

    def construct(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """x [B, ..., in] of the compute type, seeds int32 [B] or None for no dropout -> [B, ..., out]."""
        shape = ops.shape(x)
        if self.dropout is not None and seeds is not None:
            x = self.dropout(x, seeds)
        y = self.down(self.reshape(x, (-1, self.in_features)), self.cast_down(self.a, self.dtype))
        y = self.scale(self.up(y, self.cast_up(self.b, self.dtype)), self.cast(self.scaling, self.dtype))
        return self.reshape(y, shape[:-1] + (self.out_features,))  # noqa: RUF005, the graph compiler wants +


class LoraAdapter:
    """LoRA on a network, which is frozen.

    Args:
        network: gets the updates.
        config: which modules, which rank.
        modules: names of the modules; None: those `config.target_modules` stands for.
        seed: of the random start.

    Raises:
        AdapterError: no module has such a name.
    """

    kind = "lora"

    def __init__(
        self, network: GLMNetwork, config: LoraConfig, modules: Iterable[str] | None = None, seed: int = 0
    ) -> None:
        self.config = config
        linears = linear_modules(network)
        self.modules = list(target_names(config.target_modules, linears) if modules is None else modules)
        generator = np.random.default_rng(seed)
        first_stream = network.config.num_layers * DROPOUTS_PER_BLOCK
        self._parameters: dict[str, Parameter] = {}
        for place, name in enumerate(self.modules):
            update = LowRankUpdate(linears[name], config, first_stream + place, generator)
            linears[name].lora = update
            for ending, parameter in ((A, update.a), (B, update.b)):
                parameter.name = f"{name}.{ending}"  # attaching has named it by its place
                self._parameters[parameter.name] = parameter

    def parameters(self) -> list[Parameter]:
        """A and B of every module, float32."""
        return list(self._parameters.values())

    def assign(self, tensors: Mapping[str, np.ndarray], source: Path) -> None:
        """Overwrites every parameter; `tensors` by name without the prefix of `peft`.

        Raises:
            AdapterError: names or shapes differ.
        """
        assign_all(self._parameters, tensors, source)

    def restore(self, folder: Path) -> None:
        """Overwrites every parameter with what `save` has written.

        Raises:
            CheckpointError: the file is missing or damaged, or holds other tensors.
        """
        path = folder / WEIGHTS_FILE
        self.assign(stored_tensors(path, HF_PREFIX), path)

    def save(self, folder: Path, base_model: str = "") -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` as `peft` does.

        Args:
            folder: an existing folder without these files.
            base_model: where the base weights came from, for the reader of the file.
        """
        shapes = {f"{HF_PREFIX}{name}": tuple(p.shape) for name, p in self._parameters.items()}
        arrays = (parameter.asnumpy() for parameter in self._parameters.values())
        write_safetensors(folder / WEIGHTS_FILE, shapes, "float32", arrays, {"format": "pt"})
        write_config(folder, self.config, base_model)


def linear_modules(network: GLMNetwork) -> dict[str, Linear]:
    """Name -> every linear layer of a network."""
    return {name: cell for name, cell in network.cells_and_names() if isinstance(cell, Linear)}


def target_names(target_modules: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """Names of the modules that get an update, in the order of the network.

    Raises:
        AdapterError: a pattern, or a name of the list, that stands for no module; it lists the modules there are.
    """
    names = list(names)
    if isinstance(target_modules, str):
        try:
            found = [name for name in names if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise AdapterError(
                f"target_modules: {target_modules!r} is no regular expression: {error}"
            ) from None
        missing = [] if found else [target_modules]
    else:
        found = [name for name in names if any(_ends_in(name, ending) for ending in target_modules)]
        missing = [e for e in target_modules if not any(_ends_in(name, e) for name in names)]
    if missing:
        raise AdapterError(
            f"target_modules: {', '.join(map(repr, missing))} matches no module; a text is a regular expression for "
            f"the whole name, a list holds endings of names. Modules: {', '.join(_kinds(names))}"
        )
    return found


def write_config(folder: Path, config: LoraConfig, base_model: str) -> None:
    """Writes the `adapter_config.json` of `peft` into an existing folder."""
    text = json.dumps(hf_config(config, base_model), indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def hf_config(config: LoraConfig, base_model: str) -> dict[str, object]:
    """The `adapter_config.json` of `peft`."""
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "modules_to_save": None,
    }


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _kinds(names: Iterable[str]) -> list[str]:
    """Names with the number of the block left open, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
