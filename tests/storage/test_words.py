"""Near misses, numbers that YAML reads as text, and long lists in messages."""

from __future__ import annotations

import pytest

from glm_ms.storage.errors import capped
from glm_ms.storage.readers import exponent_number
from glm_ms.storage.suggest import did_you_mean, misspelled, nearest


def test_near_misses() -> None:
    known = ["hidden_size", "num_layers", "kv_channels"]
    assert did_you_mean("Hiden_Size", known) == "; did you mean hidden_size?"
    assert did_you_mean("num", known) == "; did you mean num_layers?"
    assert did_you_mean("xyz", known, "; known: a") == "; known: a"
    assert did_you_mean(5, known) == ""
    assert nearest("lr_a", ["lr_a1", "lr_a2", "lr_a3"]) == ["lr_a3", "lr_a2"]


def test_a_misspelling_is_nearer_than_a_near_miss() -> None:
    assert misspelled("contnt", ["content", "role"]) == ["content"]
    assert misspelled("role_id", ["role"]) == []
    assert nearest("role_id", ["role"]) == ["role"]


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("-.5E3", -500.0), ("+2.e+1", 20.0)])
def test_exponent_numbers(text: str, value: float) -> None:
    assert exponent_number(text) == value


@pytest.mark.parametrize("value", ["5", "1.5", "e5", "1e", "0x1e5", "1e5 ", "inf", "", 7, None, [1]])
def test_other_values_stay(value: object) -> None:
    assert exponent_number(value) is value


def test_capped() -> None:
    assert capped(["a", "b"]) == "a, b"
    assert capped([str(number) for number in range(12)], "/") == "0/1/2/3/4/5/6/7/8/9/... and 2 more"
