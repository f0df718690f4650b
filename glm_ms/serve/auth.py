"""Who may use the server: keys, and the rule for addresses that other machines reach."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_text

KEY_VARIABLE = "GLM_MS_API_KEY"
_SHORTEST = 16  # characters


class Keys:
    """The keys that open the server; only their hashes are kept.

    Args:
        keys: none means that everybody may use the server.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open_with(self, key: str) -> bool:
        """Whether `key` is one of them. The time does not depend on which one, or on how much of it is right."""
        digest, found = _digest(key), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def read_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys of a file, one a line (empty lines and lines with # are left out), and of the variable GLM_MS_API_KEY.

    Raises:
        FileError: the file cannot be read or has no key, or a key is too short or has spaces. The message has no key.
    """
    found = []
    if path is not None:
        lines = enumerate(read_text(path).split("\n"), 1)
        found = [(f"{path}:{number}", line.strip()) for number, line in lines if not line.startswith("#")]
        found = [(place, key) for place, key in found if key]
        if not found:
            raise FileError(f"{path}: no key; write one a line, for example what this prints: openssl rand -hex 32")
    if KEY_VARIABLE in environment:
        found.append((KEY_VARIABLE, environment[KEY_VARIABLE].strip()))
    for place, key in found:
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise FileError(
                f"{place}: a key has at least {_SHORTEST} printable ASCII characters and no spaces; "
                "openssl rand -hex 32 makes one"
            )
    return Keys(key for _, key in found)


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host name are reached from this machine only.

    Raises:
        OSError: the name has no address.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(item[4][0]).partition("%")[0]).is_loopback for item in found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
