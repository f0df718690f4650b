"""The parameters of a run, from its settings alone: no network is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from glm_ms.convert.names import expected_shapes
from glm_ms.convert.tensor_file import TensorInfo
from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.partition import Slice, parameter_slices, sharded_shapes
from glm_ms.peft import ADAPTERS
from glm_ms.peft.lora import linear_names, target_names
from glm_ms.quant import Quantization
from glm_ms.quant.network import replaced_shapes
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded, quantization_of

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter of the network."""

    shape: tuple[int, ...]  # of the whole
    item_bytes: float  # of an element as it is stored; a fraction if it is quantized, scales included
    trained: bool  # has a gradient and two moments


def lora_targets(settings: Settings, config: GLMConfig) -> frozenset[str]:
    """Names, within their block, of modules with a low-rank update. AdapterError if `target_modules` matches none."""
    if settings.model.pet_config.pet_type != "lora":
        return frozenset()
    names = target_names(settings.model.pet_config.target_modules, linear_names(expected_shapes(config)))
    return frozenset(re.sub(r"^transformer\.(encoder\.layers\.\d+\.)?", "", name) for name in names)


def planned_parameters(settings: Settings, config: GLMConfig) -> dict[str, PlannedParameter]:
    """Name -> parameter of the network of a run; sharded runs have the parts of joint layers.

    Raises AdapterError if `target_modules` matches no module.
    """
    pet, training = settings.model.pet_config, settings.is_training()
    shapes, stored = expected_shapes(config), ITEM_BYTES[config.param_init_type]
    base_shapes = sharded_shapes(config, shapes) if is_sharded(settings) else shapes
    trained = training and pet.pet_type is None
    result = {name: PlannedParameter(tuple(shape), stored, trained) for name, shape in base_shapes.items()}
    for name, size in quantized_bytes(shapes, quantization_of(settings)).items():
        result[name] = PlannedParameter(tuple(shapes[name]), size / math.prod(shapes[name]), False)
    if pet.pet_type is not None:
        adapter = ADAPTERS[pet.pet_type]
        for name, shape in adapter.load().shapes(adapter.config(pet), config, shapes).items():
            result[name] = PlannedParameter(shape, FLOAT32, training)
    return result


def quantized_bytes(shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None) -> dict[str, int]:
    """Bytes of each weight that is quantized, with its scales; `shapes` are those of the network."""
    if quantization is None:
        return {}
    packed = {name: TensorInfo(*info).nbytes for name, info in replaced_shapes(shapes, quantization).items()}
    found: dict[str, int] = {}
    for name, size in packed.items():
        weight = f"{name.partition('.quantized.')[0]}.weight"
        found[weight] = found.get(weight, 0) + size
    return found


@dataclass(frozen=True)
class StoredPart:
    """What a card stores of a parameter."""

    name: str
    parameter: PlannedParameter
    slice: Slice

    @property
    def elements(self) -> int:
        """Elements on the card."""
        return math.prod(self.slice.shape)

    @property
    def stored(self) -> int:
        """Bytes on the card."""
        return round(self.elements * self.parameter.item_bytes)

    @property
    def whole(self) -> int:
        """Elements once the parts of sharded optimizers are gathered."""
        return self.elements * self.slice.shards


def stored_parts(
    config: GLMConfig, parallel: ParallelConfig, parameters: Mapping[str, PlannedParameter]
) -> list[StoredPart]:
    """What a card of each stage stores of every parameter; see `glm_ms.parallel.partition`."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    items = {name: parameter.item_bytes for name, parameter in parameters.items()}
    slices = parameter_slices(config, parallel, shapes, items)
    return [StoredPart(name, parameters[name], slices[name]) for name in parameters]
