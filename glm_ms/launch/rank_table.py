"""Rank tables of Ascend servers: makes, merges, checks, reads and writes them.

A table says which cards of which servers train together, and in which order; HCCL reads its file. The format is
template 1, version "1.0", of the CANN documentation (HCCL, "rank table"): JSON in which all values are strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from glm_ms.spelling import tool
from glm_ms.storage.atomic import check_target, replace_text
from glm_ms.storage.errors import FileError, WriteError
from glm_ms.storage.readers import read_json
from glm_ms.storage.suggest import nearest

LONGEST_SERVER_ID, _MOST_PROBLEMS = 64, 5
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
    """One card. `others` are further keys of the file, written back unchanged."""

    device_id: int  # physical number of the card in its server, as in /dev/davinci0
    device_ip: str  # IPv4 or IPv6 address of its network port
    rank_id: int
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Server:
    """One server. `others` are further keys of the file, written back unchanged."""

    server_id: str  # address or other unique name
    devices: tuple[Device, ...]  # in the order of their ranks
    host_nic_ip: str = _RESERVE
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RankTable:
    """Servers that train together, in the order of their ranks. `source` is the path of the file, or empty."""

    servers: tuple[Server, ...]
    source: str = field(default="", compare=False)

    @property
    def rank_size(self) -> int:
        """Number of cards, which is the number of processes."""
        return sum(len(server.devices) for server in self.servers)

    def to_json(self) -> str:
        """Content of the file."""
        servers = [
            {
                "server_id": server.server_id,
                "device": [_device_to_json(device) for device in server.devices],
                "host_nic_ip": server.host_nic_ip,
                **server.others,
            }
            for server in self.servers
        ]
        table = {"version": _VERSION, "server_count": str(len(servers)), "server_list": servers, "status": _COMPLETED}
        return json.dumps(table, indent=4, ensure_ascii=False) + "\n"


def _device_to_json(device: Device) -> dict[str, Any]:
    ids = {"device_id": str(device.device_id), "device_ip": device.device_ip, "rank_id": str(device.rank_id)}
    return {**ids, **device.others}


def single_server(server_id: str, addresses: Mapping[int, str]) -> RankTable:
    """The table of one server; the ranks follow the order of `addresses` (device_id -> device_ip), from 0.

    Raises RankTableError if a name or address is wrong or used twice, or there are no cards.
    """
    devices = (Device(card, address, rank) for rank, (card, address) in enumerate(addresses.items()))
    table = RankTable((Server(server_id, tuple(devices)),))
    validate(table)
    return table


def merge(tables: Sequence[RankTable]) -> RankTable:
    """One table of all servers; the ranks of a table follow those of the table before.

    Raises RankTableError for fewer than two tables, a wrong one, a server or address that two of them have, and servers
    that differ in their numbers of cards.
    """
    if len(tables) < 2:
        raise RankTableError(f"{len(tables)} rank table given: nothing to merge; give one for each server")
    servers: list[Server] = []
    ranks = 0
    for table in tables:
        validate(table)
        for server in table.servers:
            devices = (replace(device, rank_id=device.rank_id + ranks) for device in server.devices)
            servers.append(replace(server, devices=tuple(devices)))
        ranks += table.rank_size
    names = [table.source or f"table {number}" for number, table in enumerate(tables) for _ in table.servers]
    several = [table.source for table in tables if table.source and len(table.servers) > 1]
    hint = f" ({several[0]} has several servers: is it the result of an earlier merge?)" if several else ""
    _raise(_between_servers(servers, names), f"cannot be merged{hint}")
    return RankTable(tuple(servers))


def validate(table: RankTable) -> None:
    """Checks all that HCCL requires and the table alone can show; RankTableError lists the problems."""
    where = table.source or "rank table"
    if not table.servers:
        raise RankTableError(f"{where}: has no servers")
    problems = [problem for server in table.servers for problem in _within_server(server)]
    problems += _between_servers(table.servers, [""] * len(table.servers))
    _raise(problems or _rank_problems(table), where)


def _raise(found: Iterable[str], where: str) -> None:
    problems = list(found)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise RankTableError(f"{where}: {shown}")


def _within_server(server: Server) -> Iterator[str]:
    if not server.server_id.strip():
        yield "a server has an empty server_id; give its address"
    if len(server.server_id) > LONGEST_SERVER_ID:
        yield f"server_id {server.server_id[:20]}...: longer than {LONGEST_SERVER_ID} characters"
    if not server.devices:
        yield f"server {server.server_id}: has no cards"
    cards: set[int] = set()
    for device in server.devices:
        if device.device_id in cards:
            yield f"server {server.server_id}: device_id {device.device_id} is there twice"
        cards.add(device.device_id)
        try:
            check_address(device.device_ip)
        except RankTableError as error:
            yield f"server {server.server_id}: card {device.device_id}: device_ip {error}"


def _between_servers(servers: Sequence[Server], names: Sequence[str]) -> Iterator[str]:
    """Duplicate servers and addresses, and differing numbers of cards; `names` are those of files."""
    labels = [server.server_id + (f" ({name})" if name else "") for server, name in zip(servers, names)]
    first: dict[Any, int] = {}
    for number, server in enumerate(servers):
        key = _comparable(server.server_id)
        other = first.setdefault(key, number)
        if other != number:
            files = f": in {names[other]} and in {names[number]}" if names[number] else ""
            yield f"server {server.server_id} is there twice{files}"
        if len(servers) > 1 and not isinstance(key, str) and key.is_loopback:
            yield f"server {labels[number]}: a loopback address; make its table again with another --server_ip"
    if len(first) < len(servers):
        return  # a second copy of a server would only repeat the problem for its addresses
    yield from _shared_addresses(servers, labels)
    if len({len(server.devices) for server in servers}) > 1:
        counts = ", ".join(f"{label} has {len(server.devices)}" for server, label in zip(servers, labels))
        yield f"servers differ in their numbers of cards ({counts}); HCCL needs the same number on each"


def _shared_addresses(servers: Sequence[Server], labels: Sequence[str]) -> Iterator[str]:
    """One problem for each server, or pair of servers, with cards of the same address."""
    first: dict[Any, tuple[int, Device]] = {}
    shared: dict[tuple[int, int], list[str]] = {}
    for number, server in enumerate(servers):
        for device in server.devices:
            other, twin = first.setdefault(_comparable(device.device_ip), (number, device))
            if twin is not device:
                cards = f"{device.device_ip} (cards {twin.device_id} and {device.device_id})"
                shared.setdefault((other, number), []).append(cards)
    for (one, other), found in shared.items():
        both = f"servers {labels[one]} and {labels[other]} both have"
        who = f"server {labels[one]} has" if one == other else both
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"{who} device_ip {', '.join(found[:3])}{more}; each card needs its own address"


def _rank_problems(table: RankTable) -> Iterator[str]:
    ranks = sorted(device.rank_id for server in table.servers for device in server.devices)
    twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
    if twice:
        yield f"rank_id there twice: {name_numbers(twice)}"
    missing = sorted(set(range(len(ranks))) - set(ranks))
    if missing:
        last = len(ranks) - 1
        yield f"rank_id missing: {name_numbers(missing)}; the ranks of {len(ranks)} cards go from 0 to {last}"
    for server in table.servers:
        own = sorted(device.rank_id for device in server.devices)
        if own[-1] - own[0] + 1 != len(own) and not twice and not missing:
            gaps = f"its ranks are {name_numbers(own)}, with gaps; the ranks of one server must be consecutive"
            yield f"server {server.server_id}: {gaps}"


def name_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers for a message: 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def check_address(text: str, *, loopback: bool = False) -> str:
    """Returns the address unchanged; RankTableError if it is not the IPv4 or IPv6 address of one machine or card."""
    address = _comparable(text)
    if isinstance(address, str) or "%" in text:
        raise RankTableError(f"{text!r} is not an IP address")
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
        raise RankTableError(f"{text} is not the address of one machine or card")
    if address.is_loopback and not loopback:
        raise RankTableError(f"{text} is a loopback address, which no other card can reach")
    return text


def _comparable(name: str) -> IPv4Address | IPv6Address | str:
    """An address as a value, because one address has several spellings; other names unchanged."""
    try:
        return ip_address(name)
    except ValueError:
        return name


def write_rank_table(table: RankTable, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes the file of a table, whole or not at all.

    Raises RankTableError if the table is wrong, or `path` exists without `overwrite` or cannot be written.
    """
    validate(table)
    check_target(path, overwrite=overwrite, error=RankTableError)
    try:
        replace_text(Path(path), table.to_json(), parents=True)
    except WriteError as error:
        raise RankTableError(str(error)) from error


def read_rank_table(path: str | Path) -> RankTable:
    """Reads and checks the file of a table of version 1.0, and sorts it by rank; RankTableError names file and key."""
    place = f"{path}: "
    document = read_json(Path(path), RankTableError, f"no such file; make it with {tool('hccl_tools')}")
    table = _object(document, str(path))
    _check_template(table, place)
    servers = [_server(*item) for item in _objects(table, "server_list", place)]
    count = _number(table, "server_count", place)
    if count != len(servers):
        raise RankTableError(f"{place}server_count is {count}, but server_list has {len(servers)} servers")
    servers.sort(key=lambda server: min((device.rank_id for device in server.devices), default=0))
    found = RankTable(tuple(servers), source=str(path))
    validate(found)
    return found


def _check_template(table: dict[str, Any], place: str) -> None:
    if "group_list" in table:
        raise RankTableError(
            f"{place}a rank table of template 2 (group_list); make a new one with {tool('hccl_tools')}"
        )
    if not table.keys() & {*_TABLE_KEYS}:
        raise RankTableError(f"{place}not a rank table: none of the keys {', '.join(_TABLE_KEYS)}")
    version = _value(table, "version", str, place)
    if version != _VERSION:
        raise RankTableError(f'{place}version is "{version}"; only "{_VERSION}" is supported')
    status = _value(table, "status", str, place)
    if status != _COMPLETED:
        remedy = "wait for its completion, or make a new table"
        raise RankTableError(f'{place}status is "{status}", not "{_COMPLETED}"; {remedy}')
    unknown = [key for key in table if key not in _TABLE_KEYS]
    if unknown:
        raise RankTableError(f'{place}unknown key "{unknown[0]}"; a rank table has {", ".join(_TABLE_KEYS)}')


def _server(server: dict[str, Any], place: str) -> Server:
    devices = [_device(*item) for item in _objects(server, "device", place)]
    return Server(
        server_id=_value(server, "server_id", str, place),
        devices=tuple(sorted(devices, key=lambda device: device.rank_id)),
        host_nic_ip=_value({"host_nic_ip": _RESERVE, **server}, "host_nic_ip", str, place),
        others={key: value for key, value in server.items() if key not in _SERVER_KEYS},
    )


def _device(device: dict[str, Any], place: str) -> Device:
    return Device(
        device_id=_number(device, "device_id", place),
        device_ip=_value(device, "device_ip", str, place),
        rank_id=_number(device, "rank_id", place),
        others={key: value for key, value in device.items() if key not in _DEVICE_KEYS},
    )


def _objects(item: dict[str, Any], key: str, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, each with the place of its keys for messages."""
    for number, value in enumerate(_value(item, key, list, place)):
        where = f"{place}{key}[{number}]"
        yield _object(value, where), f"{where}."


def _object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RankTableError(f"{where}: {_KINDS[type(item)]}, but an object is needed: {{...}}")
    return item


def _value(item: dict[str, Any], key: str, kind: type, place: str) -> Any:
    if key not in item:
        near = nearest(key, item)
        hint = f'; did you mean this by "{near[0]}"?' if near else ""
        raise RankTableError(f"{place}{key}: is missing{hint}")
    value = item[key]
    if not isinstance(value, kind):
        number = kind is str and type(value) in (int, float)
        remedy = f'; all values of a rank table are strings, write "{value}"' if number else ""
        raise RankTableError(f"{place}{key}: is {_KINDS[type(value)]}, but {_KINDS[kind]} is needed{remedy}")
    return value


def _number(item: dict[str, Any], key: str, place: str) -> int:
    text = _value(item, key, str, place)
    if not _NUMBER.fullmatch(text):
        raise RankTableError(f'{place}{key}: "{text}" is not a whole number from 0, such as "0"')
    return int(text)
