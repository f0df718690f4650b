"""Options of MindFormers' calls as those of this project: what needs no network."""

from __future__ import annotations

from typing import Any

import pytest

from glm_ms.generation.config import GenerationConfig
from glm_ms.mindformers_api.generation import default_generation, generation_arguments, set_generation
from glm_ms.settings import Settings, SettingsError
from glm_ms.settings.schema import bias_pairs


@pytest.mark.parametrize("value", [{100: -5, 7: 2.5}, ["100:-5", "7:2.5"]])
def test_a_bias_of_predict(value: Any):
    settings = Settings()
    set_generation(settings, {"logit_bias": value, "min_new_tokens": 3, "min_p": 0.1})
    assert dict(bias_pairs(settings.generation.logit_bias)) == {100: -5.0, 7: 2.5}
    assert (settings.generation.min_new_tokens, settings.generation.min_p) == (3, 0.1)


@pytest.mark.parametrize("value", [5, "7:1", ["7"], {7: 101}, {"7": 1}, {7: None}])
def test_a_bias_that_cannot_be_used(value: Any):
    with pytest.raises(SettingsError, match=r"predict\(logit_bias=.*expected a mapping of token ids to numbers"):
        set_generation(Settings(), {"logit_bias": value})


def test_sampling_options_of_generate():
    options = {"logit_bias": {7: 1.0}, "min_new_tokens": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    base = default_generation({}, pad=0)
    _, found, _ = generation_arguments([5, 6], base, {**options, "max_new_tokens": 4}, seq_length=64)
    assert {name: found[name] for name in options} == options
    assert "min_p" not in found, "a default without effect"
    assert GenerationConfig(**found).max_new_tokens == 4
