"""Marks of test cases."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_unless(daily: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `parametrize`; those that are not in `daily` run with --slow only."""
    return [case if case in daily else pytest.param(case, marks=pytest.mark.slow) for case in cases]
