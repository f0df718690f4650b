"""Rank tables: which cards of which servers train together, and in which order. HCCL reads them from a JSON file.

The format is template 1, version "1.0", of the CANN documentation (HCCL, "rank table"): all values are strings, a
server has an id of up to 64 characters, a card its physical number in the server (`device_id`), the address of its
own network port (`device_ip`) and its rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glm_ms.storage.errors import FileError

VERSION, COMPLETED, RESERVE = "1.0", "completed", "reserve"


class RankTableError(FileError):
    """A rank table, or what one is made from, is wrong."""


@dataclass(frozen=True)
class Device:
    """One card.

    Attributes:
        device_id: physical number of the card in its server, as in /dev/davinci0.
        device_ip: IPv4 or IPv6 address of the card's network port.
        rank_id: number of the process that uses the card.
        others: further keys of the file; they are written back as they were.
    """

    device_id: int
    device_ip: str
    rank_id: int
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        server_id: address or other unique name of the server.
        devices: its cards, in the order of their ranks.
        host_nic_ip: "reserve", unless a file says otherwise.
        others: further keys of the file; they are written back as they were.
    """

    server_id: str
    devices: tuple[Device, ...]
    host_nic_ip: str = RESERVE
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RankTable:
    """Servers that train together. What `rank_table` returns is valid.

    Attributes:
        servers: in the order of their ranks, whatever the order in the file.
        source: file that the table was read from, for messages; empty if none.
    """

    servers: tuple[Server, ...]
    source: str = field(default="", compare=False)

    @property
    def rank_size(self) -> int:
        """Number of cards, and so of processes."""
        return sum(len(server.devices) for server in self.servers)

    def to_json(self) -> str:
        """The text of the file."""
        servers = [
            {
                "server_id": server.server_id,
                "device": [
                    {
                        "device_id": str(device.device_id),
                        "device_ip": device.device_ip,
                        "rank_id": str(device.rank_id),
                        **device.others,
                    }
                    for device in server.devices
                ],
                "host_nic_ip": server.host_nic_ip,
                **server.others,
            }
            for server in self.servers
        ]
        table = {
            "version": VERSION,
            "server_count": str(len(servers)),
            "server_list": servers,
            "status": COMPLETED,
        }
        return json.dumps(table, indent=4, ensure_ascii=False) + "\n"
