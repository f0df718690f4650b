"""Names of models and adapters, as requests give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from glm_ms.storage.errors import FileError

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
