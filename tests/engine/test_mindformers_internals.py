"""Names of MindFormers and MindSpore that a new version may move."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from engine_helpers import REPOSITORY

INTERNALS = REPOSITORY / "glm_ms" / "engine" / "mindformers_internals.py"


def imported_names(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import from MindFormers and MindSpore."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("mindformers", "mindspore")
        for alias in node.names
    ]


def missing(names: list[tuple[str, str]]) -> list[str]:
    found = []
    for module, name in names:
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            found.append(f"{module}.{name}: {error}")
    return found


def test_every_inner_name_is_where_it_was() -> None:
    names = imported_names(INTERNALS)
    assert len(names) > 5
    assert not missing(names), f"moved by this version; change {INTERNALS}"


def test_methods_that_the_trainer_overrides() -> None:
    """MindFormers calls them by name: an override of a method that has gone would be ignored silently."""
    from mindformers.trainer import CausalLanguageModelingTrainer

    from glm_ms.engine.step.training import GLMTrainer

    overridden = [name for name, value in vars(GLMTrainer).items() if callable(value) and name[0] != "_"]
    assert {"create_optimizer_scheduler", "create_model_wrapper"} <= set(overridden)
    assert [name for name in overridden if not hasattr(CausalLanguageModelingTrainer, name)] == []


def test_a_name_that_has_moved_is_reported() -> None:
    assert missing([("mindformers", "Trainer"), ("mindformers.gone", "x"), ("mindformers", "gone")]) == [
        "mindformers.gone.x: No module named 'mindformers.gone'",
        "mindformers.gone: module 'mindformers' has no attribute 'gone'",
    ]
