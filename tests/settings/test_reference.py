"""`docs/settings.md` is what the declarations say."""

from __future__ import annotations

from pathlib import Path

from glm_ms.settings.reference import reference
from glm_ms.settings.schema import leaf_keys


def test_page_is_up_to_date(repository: Path) -> None:
    page = (repository / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m glm_ms.settings.reference > docs/settings.md"


def test_page_has_every_key() -> None:
    text = reference()
    assert text.count("\n| `") == len(leaf_keys())
    assert all("<" not in line for line in text.splitlines()[10:])
    assert "| `batch_size` | `8` | a whole number, at least 1 | training rows per step" in text
