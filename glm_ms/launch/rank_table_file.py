"""From the text of a rank table file to its servers and cards, with the place of what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from glm_ms.launch.rank_table_types import (
    COMPLETED,
    RESERVE,
    VERSION,
    Device,
    RankTable,
    RankTableError,
    Server,
)
from glm_ms.storage.readers import read_json
from glm_ms.storage.suggest import nearest

_TABLE_KEYS = ("version", "server_count", "server_list", "status")
_SERVER_KEYS = ("server_id", "device", "host_nic_ip")
_DEVICE_KEYS = ("device_id", "device_ip", "rank_id")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_KINDS = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null",
    int: "a number", float: "a number",
}  # fmt: skip


def parse_rank_table(path: str | Path) -> RankTable:
    """The table as the file has it, sorted by rank; it is not validated.

    Raises:
        RankTableError: the file cannot be read, or is no rank table of version 1.0.
    """
    table = _object(
        read_json(Path(path), RankTableError, "no such file; tools/hccl_tools.py makes one"), str(path)
    )
    where = f"{path}: "
    _check_template(table, where)
    items = _value(table, "server_list", list, where)
    servers = [_server(item, f"{where}server_list[{number}]") for number, item in enumerate(items)]
    count = _number(table, "server_count", where)
    if count != len(servers):
        raise RankTableError(f"{where}server_count is {count}, but server_list has {len(servers)} servers")
    first_rank = {
        id(server): min((device.rank_id for device in server.devices), default=0) for server in servers
    }
    return RankTable(tuple(sorted(servers, key=lambda server: first_rank[id(server)])), source=str(path))


def _check_template(table: dict[str, Any], where: str) -> None:
    if "group_list" in table:
        raise RankTableError(
            f"{where}a rank table of template 2 (group_list); make it new with tools/hccl_tools.py"
        )
    if not table.keys() & {*_TABLE_KEYS}:
        raise RankTableError(f"{where}not a rank table: none of the keys {', '.join(_TABLE_KEYS)}")
    version = _value(table, "version", str, where)
    if version != VERSION:
        raise RankTableError(f'{where}version is "{version}"; only "{VERSION}" is supported')
    status = _value(table, "status", str, where)
    if status != COMPLETED:
        raise RankTableError(
            f'{where}status is "{status}" and not "{COMPLETED}"; wait for the table to be completed, or make it new'
        )
    unknown = [key for key in table if key not in _TABLE_KEYS]
    if unknown:
        raise RankTableError(f'{where}unknown key "{unknown[0]}"; a rank table has {", ".join(_TABLE_KEYS)}')


def _server(item: Any, where: str) -> Server:
    server = _object(item, where)
    where += "."
    devices = [
        _device(device, f"{where}device[{number}]")
        for number, device in enumerate(_value(server, "device", list, where))
    ]
    return Server(
        server_id=_value(server, "server_id", str, where),
        devices=tuple(sorted(devices, key=lambda device: device.rank_id)),
        host_nic_ip=_value(server, "host_nic_ip", str, where) if "host_nic_ip" in server else RESERVE,
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
        raise RankTableError(f'{where}{key}: "{text}" is not a number from 0 upwards, such as "0"')
    return int(text)
