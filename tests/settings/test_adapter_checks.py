"""`model.pet_config` and `load_adapter`: what does not go together is refused, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import SettingsError, load_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "tiny"
BASE, ADAPTER = "load_checkpoint=base", "load_adapter=adapter"
LORA, PREFIX, NONE = (f"model.pet_config.pet_type={kind}" for kind in ("lora", "ptuning2", "null"))


def load(job: str, *overrides: str):
    return load_settings(CONFIGS / f"{job}_glm3_tiny.yaml", ["predict_data=x", *overrides], check_files=False)


@pytest.mark.parametrize("kind", [LORA, PREFIX])
def test_what_goes_together(kind: str) -> None:
    load("finetune", kind, BASE)
    load("finetune", kind, BASE, ADAPTER)
    for job in ("eval", "predict"):
        load(job, kind, BASE, ADAPTER)
        load(job, NONE, BASE, ADAPTER)
        load(job, kind, BASE)  # load_checkpoint may contain both


@pytest.mark.parametrize(
    ("job", "overrides", "message"),
    [
        ("finetune", [BASE, ADAPTER], "set model.pet_config.pet_type to continue training the adapter"),
        ("finetune", [LORA], "lora trains an adapter for given base weights"),
        ("eval", [ADAPTER, "load_checkpoint=", "model.init=random"], "needs the base it was trained on"),
        ("finetune", ["model.pet_config.lora_rank=4"], "lora_rank: has no effect without pet_type"),
        ("finetune", [LORA, BASE, "model.pet_config.pre_seq_len=4"], "pre_seq_len: has no effect with lora"),
        (
            "finetune",
            [PREFIX, BASE, "model.pet_config.lora_alpha=4"],
            "lora_alpha: has no effect with ptuning2",
        ),
        ("finetune", [BASE, "model.pet_config.pet_type=loar"], "did you mean lora"),
        ("finetune", [BASE, LORA, "model.pet_config.lora_rank=0"], "must be at least 1"),
        ("finetune", [BASE, LORA, "model.pet_config.lora_dropout=1.0"], "must be at least 0 and below 1"),
        ("finetune", [BASE, LORA, "model.pet_config.lora_alpha=1.e29"], "at most 1000000"),
        ("finetune", [BASE, LORA, "model.pet_config.lora_r=4"], "did you mean lora_rank"),
    ],
)
def test_what_does_not(job: str, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(job, *overrides)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (".*dense", ".*dense"),
        ("[query_key_value, dense]", ["query_key_value", "dense"]),
        ("[dense]", ["dense"]),
        (".*(a|b)[0-9]+", ".*(a|b)[0-9]+"),
    ],
)
def test_targets_are_a_text_or_a_list(typed: str, value: object) -> None:
    settings = load("finetune", BASE, LORA, f"model.pet_config.target_modules={typed}")
    assert settings.model.pet_config.target_modules == value


def test_targets_of_another_kind() -> None:
    with pytest.raises(SettingsError, match="target_modules: expected a list or text, found a mapping"):
        load("finetune", BASE, LORA, "model.pet_config={target_modules: {a: 1}}")
