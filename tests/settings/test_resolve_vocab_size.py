"""`padded_vocab_size: auto` and sizes that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_ms.settings import SettingsError, load_settings, resolve_vocab_size

KEY = "model.model_config.padded_vocab_size"


@pytest.mark.parametrize(("ids", "rows"), [(1, 64), (64, 64), (65, 128), (1007, 1024), (64798, 64832)])
def test_auto_is_rounded_up(ids: int, rows: int, config: Path) -> None:
    settings = load_settings(config, [f"{KEY}=auto"])
    assert resolve_vocab_size(settings, ids) == rows
    assert settings.glm_config().padded_vocab_size == rows
    assert resolve_vocab_size(settings, ids) == rows


def test_auto_must_be_resolved_before_the_network_is_built(config: Path) -> None:
    settings = load_settings(config, [f"{KEY}=auto"])
    with pytest.raises(SettingsError, match=r"padded_vocab_size: auto has not been resolved"):
        settings.glm_config()


def test_fixed_size(config: Path) -> None:
    settings = load_settings(config, [f"{KEY}=1000"])
    assert resolve_vocab_size(settings, 1000) == 1000
    with pytest.raises(SettingsError) as caught:
        resolve_vocab_size(settings, 1001)
    for part in (f"command line ({KEY}=1000)", "1000 is too small", "tokenizer.model", "1001 ids", "=auto"):
        assert part in str(caught.value)
