"""The file of a rank table: which cards of which servers train together, and in which order. HCCL reads it.

The format is template 1, version "1.0", of the CANN documentation (HCCL, "rank table"): JSON in which all values are
strings. A server has an id of up to 64 characters; a card has its physical number in the server (`device_id`), the
address of its own network port (`device_ip`) and its rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_json
from glm_ms.storage.suggest import nearest

_VERSION, _COMPLETED, _RESERVE = "1.0", "completed", "reserve"
_TABLE_KEYS = ("version", "server_count", "server_list", "status")
_SERVER_KEYS = ("server_id", "device", "host_nic_ip")
_DEVICE_KEYS = ("device_id", "device_ip", "rank_id")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_KINDS = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null",
    int: "a number", float: "a number",
}  # fmt: skip


class RankTableError(FileError):
    """A rank table, or an option or file from which one is made, is wrong."""


@dataclass(frozen=True)
class Device:
    """One card.

    Attributes:
        device_id: physical number of the card in its server, as in /dev/davinci0.
        device_ip: IPv4 or IPv6 address of the card's network port.
        rank_id: rank of the process that uses the card.
        others: further keys of the file, written back unchanged.
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
        host_nic_ip: "reserve", unless the file has another value.
        others: further keys of the file, written back unchanged.
    """

    server_id: str
    devices: tuple[Device, ...]
    host_nic_ip: str = _RESERVE
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RankTable:
    """Servers that train together.

    Attributes:
        servers: in the order of their ranks.
        source: path of the file, for messages; empty if none.
    """

    servers: tuple[Server, ...]
    source: str = field(default="", compare=False)

    @property
    def rank_size(self) -> int:
        """Number of cards, which is the number of processes."""
        return sum(len(server.devices) for server in self.servers)

    def to_json(self) -> str:
        """Content of the file."""
        servers = []
        for server in self.servers:
            devices = [
                {
                    "device_id": str(device.device_id),
                    "device_ip": device.device_ip,
                    "rank_id": str(device.rank_id),
                    **device.others,
                }
                for device in server.devices
            ]
            servers.append(
                {
                    "server_id": server.server_id,
                    "device": devices,
                    "host_nic_ip": server.host_nic_ip,
                    **server.others,
                }
            )
        table = {
            "version": _VERSION,
            "server_count": str(len(servers)),
            "server_list": servers,
            "status": _COMPLETED,
        }
        return json.dumps(table, indent=4, ensure_ascii=False) + "\n"


def parse_rank_table(path: str | Path) -> RankTable:
    """The table of a file, sorted by rank. Addresses and ranks are not checked, see `rank_table.validate`.

    Raises:
        RankTableError: the file cannot be read, or is not a rank table of version 1.0.
    """
    where = f"{path}: "
    document = read_json(Path(path), RankTableError, "no such file; make it with tools/hccl_tools.py")
    table = _object(document, str(path))
    _check_template(table, where)
    items = _value(table, "server_list", list, where)
    servers = [_server(item, f"{where}server_list[{number}]") for number, item in enumerate(items)]
    count = _number(table, "server_count", where)
    if count != len(servers):
        raise RankTableError(f"{where}server_count is {count}, but server_list has {len(servers)} servers")
    servers.sort(key=lambda server: min((device.rank_id for device in server.devices), default=0))
    return RankTable(tuple(servers), source=str(path))


def _check_template(table: dict[str, Any], where: str) -> None:
    if "group_list" in table:
        raise RankTableError(f"{where}a rank table of template 2 (group_list); make a new one with tools/hccl_tools.py")
    if not table.keys() & {*_TABLE_KEYS}:
        raise RankTableError(f"{where}not a rank table: none of the keys {', '.join(_TABLE_KEYS)}")
    version = _value(table, "version", str, where)
    if version != _VERSION:
        raise RankTableError(f'{where}version is "{version}"; only "{_VERSION}" is supported')
    status = _value(table, "status", str, where)
    if status != _COMPLETED:
        raise RankTableError(
            f'{where}status is "{status}", not "{_COMPLETED}"; wait for its completion, or make a new table'
        )
    unknown = [key for key in table if key not in _TABLE_KEYS]
    if unknown:
        raise RankTableError(f'{where}unknown key "{unknown[0]}"; a rank table has {", ".join(_TABLE_KEYS)}')


def _server(item: Any, where: str) -> Server:
    server = _object(item, where)
    where += "."
    items = _value(server, "device", list, where)
    devices = [_device(device, f"{where}device[{number}]") for number, device in enumerate(items)]
    return Server(
        server_id=_value(server, "server_id", str, where),
        devices=tuple(sorted(devices, key=lambda device: device.rank_id)),
        host_nic_ip=_value(server, "host_nic_ip", str, where) if "host_nic_ip" in server else _RESERVE,
        others={key: value for key, value in server.items() if key not in _SERVER_KEYS},
    )


def _device(item: Any, where: str) -> Device:
    device = _object(item, where)
    where += "."
    return Device(
        device_id=_number(device, "device_id", where),
        device_ip=_value(device, "device_ip", str, where),
        rank_id=_number(device, "rank_id", where),
        others={key: value for key, value in device.items() if key not in _DEVICE_KEYS},
    )


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RankTableError(f"{where}: {_KINDS[type(item)]}, but an object is needed: {{...}}")
    return item


def _value(item: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in item:
        near = nearest(key, item)
        hint = f'; did you mean this by "{near[0]}"?' if near else ""
        raise RankTableError(f"{where}{key}: is missing{hint}")
    value = item[key]
    if isinstance(value, kind):
        return value
    remedy = ""
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        remedy = f'; all values of a rank table are strings, write "{value}"'
    raise RankTableError(f"{where}{key}: is {_KINDS[type(value)]}, but {_KINDS[kind]} is needed{remedy}")


def _number(item: dict[str, Any], key: str, where: str) -> int:
    text = _value(item, key, str, where)
    if not _NUMBER.fullmatch(text):
        raise RankTableError(f'{where}{key}: "{text}" is not a whole number from 0, such as "0"')
    return int(text)
