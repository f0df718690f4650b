"""The parameters of a run, from its settings alone: no network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from glm_ms.convert import expected_shapes
from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.slices import Slice, parameter_slices, sharded_shapes
from glm_ms.peft.lora import target_names
from glm_ms.peft.ptuning import prefix_shapes
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter of the network.

    Attributes:
        shape: of the whole.
        item_bytes: of an element as it is stored.
        trained: has a gradient and two moments.
    """

    shape: tuple[int, ...]
    item_bytes: int
    trained: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def lora_targets(settings: Settings, config: GLMConfig) -> list[str]:
    """Modules with a low-rank update; empty if the run has no LoRA adapter.

    Raises:
        AdapterError: `target_modules` matches none.
    """
    if settings.model.pet_config.pet_type != "lora":
        return []
    return target_names(settings.model.pet_config.target_modules, _linear_modules(expected_shapes(config)))


def planned_parameters(settings: Settings, config: GLMConfig) -> dict[str, PlannedParameter]:
    """Name -> parameter of the network of a run; sharded runs have the parts of joint layers.

    Args:
        settings: of the run.
        config: its architecture.

    Raises:
        AdapterError: `target_modules` matches no module.
    """
    pet, training = settings.model.pet_config, settings.is_training()
    shapes = expected_shapes(config)
    base_shapes = sharded_shapes(config, shapes) if is_sharded(settings) else shapes
    trained = training and pet.pet_type is None
    stored = ITEM_BYTES[config.param_init_type]
    result = {name: PlannedParameter(tuple(shape), stored, trained) for name, shape in base_shapes.items()}
    for module in lora_targets(settings, config):
        rows, columns = shapes[f"{module}.weight"]
        result[f"{module}.lora_A.weight"] = PlannedParameter((pet.lora_rank, columns), FLOAT32, training)
        result[f"{module}.lora_B.weight"] = PlannedParameter((rows, pet.lora_rank), FLOAT32, training)
    if pet.pet_type == "ptuning2":
        inner = (pet.projection_dim or config.hidden_size) if pet.prefix_projection else None
        for name, shape in prefix_shapes(config, pet.pre_seq_len, inner).items():
            result[f"transformer.prefix_encoder.{name}"] = PlannedParameter(shape, FLOAT32, training)
    return result


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
        return self.elements * self.parameter.item_bytes

    @property
    def whole(self) -> int:
        """Elements once the parts of sharded optimizers are gathered."""
        return self.elements * self.slice.shards


def stored_parts(
    config: GLMConfig, parallel: ParallelConfig, parameters: Mapping[str, PlannedParameter]
) -> list[StoredPart]:
    """What a card of each stage stores of every parameter; see `glm_ms.parallel.slices`."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    items = {name: parameter.item_bytes for name, parameter in parameters.items()}
    slices = parameter_slices(config, parallel, shapes, items)
    return [StoredPart(name, parameters[name], slices[name]) for name in parameters]


def _linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    matrices = (name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight"))
    return [name.removesuffix(".weight") for name in matrices]
