"""Names of models and adapters, as requests give them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from glm_ms.storage.errors import FileError
from glm_ms.storage.suggest import did_you_mean

# A name is the `model` of requests and a label of metrics.
NAME = re.compile(r"[A-Za-z0-9][\w./:@-]{0,99}", re.ASCII)
FORM = "begins with a letter or a digit and has at most 100 letters, digits and characters of _ . / : @ -"


def named_adapters(items: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH of a command line -> the path of each name.

    Raises:
        FileError: another form, or a name twice.
    """
    found: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not path or NAME.fullmatch(name) is None:
            raise FileError(f"--adapter {item}: must be NAME=PATH; a name {FORM}")
        if name in found:
            raise FileError(f"--adapter {item}: the name {name} is given twice")
        found[name] = Path(path)
    return found


def lora_alphas(items: Sequence[str], adapters: Collection[str]) -> dict[str | None, float]:
    """ALPHA and NAME=ALPHA of a command line -> the alpha of each adapter; None: of those that are not named.

    Raises:
        FileError: a name that no adapter has, an alpha that is not a positive number, or one that is given twice.
    """
    found: dict[str | None, float] = {}
    for item in items:
        name, equals, text = item.rpartition("=")
        if equals and name not in adapters:
            hint = did_you_mean(name, adapters, "; it names one of --adapter")
            raise FileError(f"--lora-alpha {item}: there is no adapter {name}{hint}")
        try:
            alpha = float(text)
        except ValueError:
            alpha = math.nan
        if not 0 < alpha < math.inf:
            raise FileError(f"--lora-alpha {item}: must be ALPHA or NAME=ALPHA, with a number above 0")
        key = name if equals else None
        if key in found:
            raise FileError(f"--lora-alpha {item}: {f'that of {name}' if equals else 'it'} is given twice")
        found[key] = alpha
    return found
