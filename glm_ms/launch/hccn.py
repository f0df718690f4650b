"""Cards of this server and the addresses of their network ports, from hccn.conf or hccn_tool."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

from glm_ms.launch.rank_table import RankTableError, check_address, name_numbers

HCCN_CONF = Path("/etc/hccn.conf")
# Where drivers install the tool; searched after PATH.
HCCN_TOOL_PLACES = (Path("/usr/local/Ascend/driver/tools/hccn_tool"), Path("/usr/local/bin/hccn_tool"))
# More than any server has: a typing error in a range must not ask for thousands of cards.
MOST_CARDS = 64
_HALF = 4
_TIMEOUT = 30  # seconds for one call of hccn_tool, which usually takes less than one

_RANGE = re.compile(r"\[\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*([)\]])")
_COUNT = re.compile(r"[0-9]{1,6}")
_ADDRESS_LINE = re.compile(r"address_([0-9]{1,6})\s*=\s*(\S+)")
_TOOL_ADDRESS = re.compile(r"^\s*ipaddr\s*:\s*(\S+)\s*$", re.MULTILINE)


def card_range(text: str) -> range:
    """Logical cards of "[0,8)", which is 0 to 7, or of "8", which is the first 8; RankTableError for another form."""
    text = text.strip()
    where = f'--device_num "{text}":'
    match = _RANGE.fullmatch(text)
    if match:
        first, end = int(match[1]), int(match[2])
        if match[3] == "]":
            raise RankTableError(
                f"{where} the end is not part of a range; "
                f'write "[{first},{end})" for cards up to {end - 1}, "[{first},{end + 1})" for cards up to {end}'
            )
        cards = range(first, end)
    elif _COUNT.fullmatch(text):
        cards = range(int(text))
    else:
        raise RankTableError(f'{where} write a range such as "[0,8)" for cards 0 to 7, or a number')
    if not cards:
        reverse = f'; did you mean "[{cards.stop},{cards.start})"?' if cards.stop < cards.start else ""
        raise RankTableError(f"{where} has no cards{reverse}")
    if cards.stop > MOST_CARDS:
        raise RankTableError(f"{where} no server has more than {MOST_CARDS} cards")
    return cards


def visible_cards(text: str) -> tuple[int, ...]:
    """Physical cards of "4,5,6,7", the first is logical card 0; RankTableError for another form, or a card twice."""
    where = f'--visible_devices "{text}":'
    cards: list[int] = []
    for item in text.split(","):
        if not _COUNT.fullmatch(item.strip()):
            raise RankTableError(f'{where} {item!r} is not a card; write "0,1,2,3"')
        card = int(item)
        if card in cards:
            raise RankTableError(f"{where} card {card} is there twice")
        if card >= MOST_CARDS:
            raise RankTableError(f"{where} no server has a card {card}")
        cards.append(card)
    return tuple(cards)


def physical_cards(logical: Sequence[int], visible: Sequence[int] | None) -> tuple[int, ...]:
    """Physical numbers of logical cards, the same without `visible`; RankTableError if a card is not visible."""
    if visible is None:
        return tuple(logical)
    if any(card >= len(visible) for card in logical):
        raise RankTableError(
            f"--device_num asks for logical cards {name_numbers(logical)}, but --visible_devices has "
            f'{len(visible)}, so that they end at {len(visible) - 1}; "[0,{len(visible)})" takes them all'
        )
    return tuple(visible[card] for card in logical)


def note_on_halves(cards: Sequence[int]) -> str | None:
    """A remark if the cards are of both halves of an 8-card server, but not all 8; else None."""
    low = sum(card < _HALF for card in cards)
    if max(cards) >= 2 * _HALF or low in (0, len(cards)) or len(cards) == 2 * _HALF:
        return None
    return (
        f"cards {name_numbers(sorted(cards))} are of both halves of the server (0-3 and 4-7); on Atlas 800 "
        "training servers with Ascend 910A, HCCL accepts cards of one half, or all 8"
    )


def read_addresses(
    cards: Sequence[int], conf: str | Path | None = None, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[int, str], str]:
    """Addresses of physical cards, and the file or program that they are from.

    `conf` is a file of lines such as `address_0=192.98.92.107`, which must exist; by default /etc/hccn.conf, if it
    exists. hccn_tool, if it is there, gives the addresses that the file lacks, and has priority where both differ: the
    file is what the driver was to set, not what the card has. `say` receives remarks. Raises RankTableError if a card
    has no address, or one that is wrong or also that of another card.
    """
    path = HCCN_CONF if conf is None else Path(conf)
    try:
        listed, reason = read_hccn_conf(path), "no address_{card}= line"
    except OSError as error:
        if conf is not None:
            raise RankTableError(f"{path}: --hccn_conf: cannot be read: {error.strerror}") from None
        listed, reason = {}, f"cannot be read ({error.strerror})"
        if not isinstance(error, FileNotFoundError):
            say(f"{path}: {reason}; using hccn_tool")
    missing = [card for card in cards if card not in listed]
    tool = _find_hccn_tool()
    try:
        answers = {card: _ask(tool, card) for card in cards} if tool else {}
    except RankTableError as error:
        if missing:
            raise
        say(f"{error}; using {path}")
        answers = {}
    asked = {card: address for card, (address, _) in answers.items() if address is not None}
    failed = [card for card in missing if card not in asked]
    if failed:
        places = ", ".join(map(str, HCCN_TOOL_PLACES))
        said = answers[failed[0]][1] if answers else f"neither on PATH nor {places}"
        raise RankTableError(
            f"{_name_cards(failed)}: no address. {path}: {reason.format(card=failed[0])}. {tool or 'hccn_tool'}: "
            f"{said}. Set one: hccn_tool -i {failed[0]} -ip -s address A.B.C.D netmask 255.255.255.0, "
            "or add it to the file"
        )
    for card in cards:
        if card in asked and card in listed and asked[card] != listed[card]:
            both = f"card {card} has {listed[card]}, but {tool} says {asked[card]}"
            say(f"{path}: {both}, which is used; correct the file")
        elif answers and card not in asked:
            say(f"{tool}: {answers[card][1]}; using {listed[card]} of {path}")
    found = {card: asked.get(card) or listed[card] for card in cards}
    origins = {card: str(path if found[card] == listed.get(card) else tool) for card in cards}
    _check_addresses(found, origins)
    if 0 < len(missing) < len(cards):
        say(f"{path}: has no address of {_name_cards(missing)}; using hccn_tool for it")
    return found, " and ".join(sorted(set(origins.values())))


def read_hccn_conf(path: Path) -> dict[int, str]:
    """Card -> address; ignores other lines of the file (netmask_0=..., comments).

    Raises RankTableError if a line with an address is incomplete or differs from an earlier one for its card, and
    OSError.
    """
    addresses: dict[int, str] = {}
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line.startswith("address_"):
            continue
        match = _ADDRESS_LINE.fullmatch(line)
        if not match:
            raise RankTableError(f"{path}:{number}: {line!r}: write it as address_0=192.98.92.107")
        card, address = int(match[1]), match[2]
        if addresses.setdefault(card, address) != address:
            raise RankTableError(f"{path}:{number}: card {card} has two addresses, {addresses[card]} and {address}")
    return addresses


def _find_hccn_tool() -> Path | None:
    """The program on PATH, else where drivers install it, else None."""
    on_path = shutil.which("hccn_tool")
    places = [Path(on_path)] if on_path else HCCN_TOOL_PLACES
    return next((place for place in places if place.is_file()), None)


def _ask(tool: Path, card: int) -> tuple[str | None, str]:
    """The address of a card, None if it has none, and what the tool said."""
    command = [str(tool), "-i", str(card), "-ip", "-g"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_TIMEOUT, check=False
        )  # fmt: skip
    except OSError as error:
        raise RankTableError(f"{tool}: cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise RankTableError(
            f"{' '.join(command)}: no answer for {_TIMEOUT} s; check that the driver works (npu-smi info), "
            "or give the addresses in a file with --hccn_conf"
        ) from None
    output = done.stdout.decode("utf-8", errors="replace")
    match = _TOOL_ADDRESS.search(output) if done.returncode == 0 else None
    lines = output.strip().splitlines()
    said = f'said "{lines[-1].strip()[:200]}"' if lines else "said nothing"
    return match[1] if match else None, f"-i {card} -ip -g {said} (exit status {done.returncode})"


def _name_cards(cards: Sequence[int]) -> str:
    return f"card{'s' if len(cards) > 1 else ''} {name_numbers(sorted(cards))}"


def _check_addresses(addresses: dict[int, str], origins: dict[int, str]) -> None:
    seen: dict[object, int] = {}
    for card, address in addresses.items():
        try:
            check_address(address)
        except RankTableError as error:
            raise RankTableError(f"{origins[card]}: card {card}: {error}") from None
        other = seen.setdefault(ip_address(address), card)
        if other != card:
            files = " and ".join(sorted({origins[card], origins[other]}))
            raise RankTableError(f"{files}: cards {other} and {card} have the same address, {address}")


def host_address() -> str:
    """The address to which the name of this host resolves; RankTableError unless exactly one can be used elsewhere."""
    name = socket.gethostname()
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        entries = []
    named = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    usable = [item for item in named if not (ip_address(item).is_loopback or ip_address(item).is_link_local)]
    usable = [item for item in usable if "." in item] or usable
    if len(usable) == 1:
        return usable[0]
    if usable:
        raise RankTableError(f"this host ({name}) has several addresses: {', '.join(usable)}; give one as --server_ip")
    means = f"resolves to {', '.join(named)}" if named else "resolves to no address"
    route = _route_address()
    offer = f", perhaps {route} (its default route)" if route else ""
    raise RankTableError(
        f"the name of this host ({name}) {means}, where no other server can reach it; "
        f"give the address of this server as --server_ip{offer}"
    )


def _route_address() -> str | None:
    """Address of this host on its default route; None without one."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing, it only looks up the route. The address is reserved for
            # documentation (RFC 5737).
            probe.connect(("203.0.113.1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
