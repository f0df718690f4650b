"""Where `model.kv_cache` is refused, and the flag that sets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import SettingsError, load_settings
from glm_ms.settings.cli import parse_args

PREDICT = ("run_mode=predict", "load_checkpoint=data", "predict_data=a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kv_cache=int4", *PREDICT], "model.kv_cache: .*int4.* float32, bfloat16, int8"),
        (["model.kv_cache=int8", "context.device_target=Ascend", *PREDICT], "only the C\\+\\+ kernels of a CPU"),
        (["model.kv_cache=int8", "run_mode=export", "load_checkpoint=data"], "the cache of exported graphs"),
    ],
)
def test_what_is_refused(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(config, overrides)
    assert len(caught.value.problems) == 1


def test_training_without_evaluation_says_that_it_has_no_effect(config: Path) -> None:
    for evaluates in (False, True):
        settings = load_settings(config, ["model.kv_cache=int8", f"do_eval={evaluates}"], check_files=False)
        said = [note for note in settings.notes if "model.kv_cache: int8 has no effect" in note]
        assert len(said) == (not evaluates)


def test_the_flag_has_both_spellings(config: Path) -> None:
    for flag in ("--kv_cache", "--kv-cache"):
        arguments = parse_args(["--config", str(config), flag, "int8"])
        assert load_settings(config, [], arguments.flags).model.kv_cache == "int8"
    with pytest.raises(SettingsError, match="--kv-cache is given twice, also as --kv_cache"):
        parse_args(["--config", str(config), "--kv_cache", "int8", "--kv-cache", "int8"])
