"""Every file for Atlas servers fits the cards it is written for, and its header says how much it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm_ms.plan import RunPlan, plan_run
from tools.plan import GIB, settings_for, usable

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("glm[23]/*.yaml"))
PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "copies of weights": "copies",
    "activations": "activations", "KV cache": "kv_cache",
}  # fmt: skip


def memory_line(plan: RunPlan) -> str:
    """The header's sentence, in GiB."""
    sizes = {name: getattr(plan.card, field) / GIB for name, field in PARTS.items()}
    parts = " + ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size >= 0.05)
    return f"Memory of a card, planned (tools/plan.py): {plan.card.total / GIB:.1f} GiB = {parts}."


def card_memory(path: Path) -> int:
    """Of the server that a file is for; files without one in their name are to run on the smaller."""
    return (64 if path.stem.endswith("64G") else 32) * GIB


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_fits_and_says_so(path: Path) -> None:
    parallel = ["use_parallel=True"] if "--use_parallel True" in path.read_text(encoding="utf-8") else []
    settings, cards = settings_for(str(path), parallel, None)
    plan = plan_run(settings, cards)
    assert plan.card.total <= usable(settings, card_memory(path))
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    text = re.sub(r"\s*\n#\s*", " ", "\n".join(comments))
    assert memory_line(plan) in text


def test_there_are_files() -> None:
    assert len(CONFIGS) > 30
