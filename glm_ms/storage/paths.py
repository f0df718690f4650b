"""What can be said about a path before a file is opened."""

from __future__ import annotations

import glob
import os
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux


def path_problem(text: str | os.PathLike[str]) -> str:
    """Why a value cannot be the path of any file, with the remedy; empty if it can."""
    if not isinstance(text, (str, os.PathLike)):
        return f"{text!r:.60}: a path must be a text or a pathlib.Path, found {type(text).__name__}"
    text = os.fspath(text)
    if not isinstance(text, str):
        return f"{text!r:.60}: a path must be a text or a pathlib.Path, found {type(text).__name__}"
    try:
        encoded = os.fsencode(text)
        encoded.decode("utf-8")
    except UnicodeError:
        return f"{text!r}: a path must be UTF-8 text; rename the file or folder"
    if not encoded:
        return "a path is empty; give one, . for the current folder"
    if b"\0" in encoded:
        return f"{text!r}: a path cannot contain a NUL character; remove it"
    if len(encoded) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in encoded.split(b"/")):
        return f"{text[:40]}...: too long for a path ({len(encoded)} bytes); give a shorter one"
    return ""


def exists(path: str | Path) -> bool:
    """Whether a path exists; one that the system cannot look up, for example a name that is too long, does not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def pattern_hint(text: str | Path) -> str:
    """End of a message about a file that does not exist, if a quoted `*` kept the shell from listing files."""
    text = str(text)
    found = sorted(glob.glob(text)) if glob.has_magic(text) and not path_problem(text) else []
    if not found:
        return ""
    names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f"; a pattern is not expanded here: give the files ({names}), or remove the quotes around it"
