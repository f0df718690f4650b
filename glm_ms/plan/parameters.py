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
    """Modules that a LoRA run gives an update; empty for other runs.

    Raises:
        AdapterError: `target_modules` matches none.
    """
    if settings.model.pet_config.pet_type != "lora":
        return []
    return target_names(settings.model.pet_config.target_modules, _linear_modules(expected_shapes(config)))


def planned_parameters(settings: Settings, config: GLMConfig) -> dict[str, PlannedParameter]:
    """Name -> parameter of the network that a run works with, in a sharded run with joint layers in parts.

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


def planned_slices(
    config: GLMConfig, parallel: ParallelConfig, parameters: Mapping[str, PlannedParameter]
) -> dict[str, Slice]:
    """What a card of each stage stores of every parameter; see `glm_ms.parallel.slices`."""
    return parameter_slices(
        config,
        parallel,
        {name: parameter.shape for name, parameter in parameters.items()},
        {name: parameter.item_bytes for name, parameter in parameters.items()},
    )


def _linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    matrices = (name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight"))
    return [name.removesuffix(".weight") for name in matrices]
