"""Where `model.quantization_bit` is refused, and what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.quant import Quantization
from glm_ms.settings import SettingsError, load_settings
from glm_ms.settings.schema import quantization_of

LORA = ("model.pet_config.pet_type=lora", "load_checkpoint=data")
SHARDED = ("use_parallel=True", "parallel.parallel_mode=1", "parallel.full_batch=True")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization_bit=4"], "integers cannot be trained; set model.pet_config.pet_type"),
        (["model.quantization_bit=5", *LORA], "model.quantization_bit"),
        (["model.quantization_bit=8", "model.quantization_group=64", *LORA], "has no effect with .*: 8"),
        (["model.quantization_group=64", *LORA], "has no effect with .*: None"),
        (["model.quantization_bit=4", "model.quantization_group=48", *LORA], "model.quantization_group"),
        (["model.quantization_bit=8", *LORA, *SHARDED], "packed weights are not split over cards"),
        (["model.quantization_bit=8", "run_mode=export", "load_checkpoint=data"], "exported files have the weights"),
    ],
)
def test_what_is_refused(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(config, overrides)
    assert len(caught.value.problems) == 1


def test_what_it_means(config: Path) -> None:
    assert quantization_of(load_settings(config)) is None
    assert quantization_of(load_settings(config, ["model.quantization_bit=4", *LORA])) == Quantization(4, 32)
    with_group = ["model.quantization_bit=4", "model.quantization_group=128", *LORA]
    assert quantization_of(load_settings(config, with_group)) == Quantization(4, 128)
    assert quantization_of(load_settings(config, ["model.quantization_bit=8", *LORA])) == Quantization(8)
