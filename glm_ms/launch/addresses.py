"""Addresses and ports of this machine."""

from __future__ import annotations

import errno
import socket

from glm_ms.launch.processes import claim


def is_local(address: str) -> bool:
    """Whether this machine has an address (no name)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def take_port(port: int) -> socket.socket | None:
    """Reserves a port that no program of this machine listens on, among the launchers of this machine.

    Returns:
        What to keep as long as the port is to be reserved; None when it is taken.
    """
    holder = claim(f"port {port}")
    if holder is None:
        return None
    with socket.socket() as probe:
        # As the scheduler does: connections of a former job that linger are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            holder.close()
            return None
    return holder
