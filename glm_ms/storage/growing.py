"""Files that grow while a program runs: each addition is there whole or not at all, and a lost file is noticed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError, WriteError, not_written
from glm_ms.storage.readers import parse_object


class GrowingFile:
    """A file to which this process appends. It is created if it is missing; what is in it stays.

    Raises:
        WriteError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(not_written(path, error)) from error

    def append(self, content: bytes) -> None:
        """Appends bytes, all or none.

        Raises:
            WriteError: they cannot be written, or the file is no longer at its path.
        """
        self.check()
        size = os.fstat(self._descriptor).st_size
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            if isinstance(error, OSError):
                raise WriteError(not_written(self.path, error)) from error
            raise

    def append_lines(self, *lines: str) -> None:
        """Appends lines of text, all or none; raises WriteError as `append`. JSON reads a lone surrogate back."""
        self.append("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))

    def check(self) -> None:
        """Raises WriteError if the file, or its folder, has been removed, renamed or replaced."""
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            same = False
        if not same:
            raise WriteError(
                f"{self.path}: this file, or its folder, has been removed, renamed or replaced while the program was "
                "writing to it; restore it and resume, or start again"
            )

    def sync(self) -> None:
        """Writes the content to the disk; raises WriteError as `append`."""
        self.check()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise WriteError(not_written(self.path, error)) from error

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path, fields: Mapping[str, type]) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """The lines of a file of JSON objects, as bytes with their values, and the numbers of damaged lines.

    `fields` are the types of keys that every object must have. A last line without line end is left out: its writer was
    killed. An absent file has no lines. Raises OSError.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    found, damaged = [], []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            value = parse_object(line.decode("utf-8"), path)
        except (FileError, UnicodeDecodeError):
            value = {}
        if all(isinstance(value.get(key), kind) for key, kind in fields.items()):
            found.append((line + b"\n", value))
        else:
            damaged.append(number)
    return found, damaged
