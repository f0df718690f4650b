"""`model.pet_config` and `load_adapter` against each other and the rest of the settings."""

from __future__ import annotations

from collections.abc import Iterator

from glm_ms.settings.schema import Settings
from glm_ms.settings.sections import PET_KEYS, PetSettings

_PET = "model.pet_config"


def adapter_problems(settings: Settings) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(key, what is wrong with it, other keys it depends on) for each problem."""
    kind, training = settings.model.pet_config.pet_type, settings.is_training()
    if training or kind is not None:  # the settings of a LoRA run may serve to evaluate its merged weights
        yield from _idle_keys(settings.model.pet_config)
    if training and kind is None and settings.load_adapter:
        message = (
            "training would change the weights under the adapter; set model.pet_config.pet_type to train the adapter "
            "on, or merge it first (tools/merge_lora.py) and begin with the result"
        )
        yield "load_adapter", message, (f"{_PET}.pet_type",)
    if training and kind is not None and not settings.load_checkpoint:
        message = (
            f"{kind} trains an adapter for a given base, which over random weights nobody could use; name the base "
            "(--load_checkpoint PATH)"
        )
        yield f"{_PET}.pet_type", message, ("load_checkpoint",)
    if not training and kind is not None and not settings.load_adapter:
        message = (
            f"{kind}, but there is no adapter to load; name it (--load_adapter PATH), or set {_PET}.pet_type=null for "
            "the base alone or for merged weights"
        )
        yield f"{_PET}.pet_type", message, ("load_adapter",)
    if not training and settings.load_adapter and not settings.load_checkpoint:
        yield (
            "load_adapter",
            "needs the base it was trained on (--load_checkpoint PATH)",
            ("load_checkpoint",),
        )


def _idle_keys(pet: PetSettings) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Keys of the other type, set to something: a slip that must not pass in silence."""
    for kind, names in PET_KEYS.items():
        for name in names:
            if pet.pet_type != kind and getattr(pet, name) != getattr(PetSettings(), name):
                chosen = f"with {pet.pet_type}" if pet.pet_type else "without pet_type"
                yield (
                    f"{_PET}.{name}",
                    f"has no effect {chosen}; remove it, or use pet_type: {kind}",
                    (f"{_PET}.pet_type",),
                )
