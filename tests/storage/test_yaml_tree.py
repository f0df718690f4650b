"""One reader for YAML: plain values, numbers of YAML 1.2, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm_ms.model.config import ConfigError, GLMConfig
from glm_ms.storage.errors import CheckpointError, FileError
from glm_ms.storage.yaml_tree import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("+5", 5), ("-0", 0), ("1_000", 1000), ("0x1F", 31), ("0b11", 3),
        ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("1.e-5", 1e-5), ("-.inf", float("-inf")), ("01.5", 1.5),
        ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1_", "1_"), ("0o10", "0o10"),
        ("2026-01-31", "2026-01-31"), ("2026-13-45", "2026-13-45"), ("=", "="), ("'5'", "5"),
        ("yes", True), ("Off", False), ("~", None), ("", None),
        ("!!str 010", "010"), ("!!int 5", 5), ("!!int '5'", 5), ("!!float 5", 5.0), ("!!null ''", None),
        ("[!!str 1, {a: &x 2}]", ["1", {"a": 2}]), ("!!map {a: !!seq [1]}", {"a": [1]}),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text, "typed").plain()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["!!bool maybe", "!!int ''", "!!int x", "!!int 010", "!!float ''", "!!null 5", "!!timestamp x", "!!binary é",
     "!!python/name:os.system", "!other 3", "!!set {a, b}", "!!omap [a: 1]", "!!str {a: 1}", "!!map [1]", "!!seq {}",
     "!!str [1]", "{a: !!bool 3}", "[!!int '']", "{!!int a: 1}"],
)  # fmt: skip
def test_tags_that_do_not_fit(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"typed: not valid YAML: no constructor of the tag !.*remove the tag"):
        parse_yaml(text, "typed", CheckpointError)


@pytest.mark.parametrize("text", ['a: "\\ud800"', '"x\\udfff": 1', 'a: ["\\ud83d\\ude00"]'])
def test_half_a_character(text: str) -> None:
    with pytest.raises(FileError, match=r"run.yaml:1.*half of a surrogate pair"):
        parse_yaml(text, "run.yaml", lines=True)


def test_shared_values_are_converted_once() -> None:
    text = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
    value = parse_yaml(text, "typed").plain()
    assert value["a2"] == [[["x"], ["x"]], [["x"], ["x"]]]
    assert value["a39"][0] is value["a39"][1]


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "nothing.yaml"])
def test_names_that_are_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileError):
        read_yaml(tmp_path / name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [("num_layers: 2\n    num_layers: 3", "config.yaml:4: key num_layers is given twice"),
     ("num_layers: 010", "num_layers = '010': expected int"),
     ("rope_ratio: 1:30", "rope_ratio = '1:30': expected float"),
     ("num_layers: !!int ''", "config.yaml:3: not valid YAML"),
     ("num_layers: " + "[" * 200, "nested more than")],
)  # fmt: skip
def test_the_network_of_a_yaml_uses_it(sizes: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model:\n  model_config:\n    {sizes}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        GLMConfig.from_pretrained(path)
