"""Numbers that YAML reads as text."""

from __future__ import annotations

import re
from typing import Any

_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def exponent_number(value: Any) -> Any:
    """`value` as a float if it is text like 1e-5 or .5E3, else `value` unchanged.

    YAML 1.1 reads a number as text if it has an exponent but no dot or no sign of the exponent.
    """
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
        return float(value)
    return value
