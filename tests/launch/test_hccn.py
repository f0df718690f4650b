"""Cards and their addresses, with stand-ins for hccn.conf, hccn_tool and the names of the host."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from glm_ms.launch import hccn
from glm_ms.launch.rank_table import RankTableError

# Answers for cards 0 to 7 as the tool does; says of others that there is no such card.
TOOL = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
[ "$1 $3 $4" = "-i -ip -g" ] || exit 9
case $2 in
    [0-7]) printf 'ipaddr:192.98.92.10%s\\nnetmask:255.255.255.0\\n' "$2" ;;
    *) echo "Cmd returns error"; echo "device id $2 is invalid" >&2; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """No file and no tool of the machine that runs the test."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(hccn, "HCCN_CONF", tmp_path / "etc" / "hccn.conf")
    monkeypatch.setattr(hccn, "HCCN_TOOL_PLACES", (tmp_path / "driver" / "hccn_tool",))


def install_tool(path: Path, text: str = TOOL) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tool(tmp_path) -> Path:
    return install_tool(tmp_path / "bin" / "hccn_tool")


def conf(tmp_path: Path, text: str | None = None, cards=range(8)) -> Path:
    lines = [f"address_{card}=192.1.27.{card + 6}\nnetmask_{card}=255.255.255.0\n" for card in cards]
    path = tmp_path / "hccn.conf"
    path.write_text("".join(lines) if text is None else text)
    return path


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("[0,8)", range(8)), ("[3,4)", [3]), ("[4,8)", range(4, 8)), (" [ 0 , 2 ) ", [0, 1]), ("8", range(8)),
        ("1", [0]), ("[8,16)", range(8, 16)),
    ]
)  # fmt: skip
def test_ranges_of_cards(text, cards):
    assert list(hccn.card_range(text)) == list(cards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0,8]", r'write "\[0,8\)" for cards up to 7, "\[0,9\)" for cards up to 8'),
        ("[8,0)", r'has no cards; did you mean "\[0,8\)"'),
        ("[4,4)", r"has no cards$"),
        ("0", "has no cards$"),
        ("[0,65)", "no server has more than 64 cards"),
        ("999999", "no server has more than 64 cards"),
        ("", "write a range such as"),
        ("0,8", "write a range such as"),
        ("(0,8)", "write a range such as"),
        ("[-1,8)", "write a range such as"),
        ("[0,9999999)", "write a range such as"),
        ("[0,8))", "write a range such as"),
        ("eight", "write a range such as"),
    ],
)
def test_what_is_no_range(text, message):
    with pytest.raises(RankTableError, match=message) as error:
        hccn.card_range(text)
    assert str(error.value).startswith(f'--device_num "{text}": ')


def test_visible_cards():
    assert hccn.visible_cards("4, 5,7,6") == (4, 5, 7, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,5,4", "card 4 is there twice"), ("", "'' is not a card"), ("1,", "'' is not a card"),
        ("1;2", "'1;2' is not a card"), ("-1", "'-1' is not a card"), ("٣", "is not a card"),
        ("64", "no server has a card 64"),
    ]
)  # fmt: skip
def test_what_are_no_visible_cards(text, message):
    with pytest.raises(RankTableError, match=message):
        hccn.visible_cards(text)


def test_logical_cards_are_mapped_to_physical_ones():
    assert hccn.physical_cards(range(1, 3), (4, 6, 5, 7)) == (6, 5)
    assert hccn.physical_cards(range(4, 6), None) == (4, 5)
    with pytest.raises(RankTableError, match=r'logical cards 4-7, but --visible_devices has 4, .* "\[0,4\)" takes'):
        hccn.physical_cards(range(4, 8), (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("cards", "noted"),
    [
        (range(8), False),
        (range(4), False),
        ((5,), False),
        (range(16), False),
        (range(3, 6), True),
        ((0, 4), True),
    ],
)
def test_cards_of_both_halves_are_noted(cards, noted):
    note = hccn.note_on_halves(cards)
    assert (note is not None) == noted
    assert not noted or "910A" in note


def test_addresses_from_the_file_alone(tmp_path):
    path = conf(tmp_path, "# made by hand\n\naddress_0 = 192.1.27.6\r\nnetmask_0=255.255.255.0\n  address_1=192.1.27.7")
    found, origin = hccn.read_addresses([1, 0], path)
    assert list(found.items()) == [(1, "192.1.27.7"), (0, "192.1.27.6")]
    assert origin == str(path)


def test_the_tool_knows_better_than_the_file(tmp_path, tool):
    path = conf(tmp_path, "address_0=192.98.92.100\naddress_1=192.1.27.7\naddress_9=192.1.27.9\n")
    remarks: list[str] = []
    found, origin = hccn.read_addresses([0, 1, 9], path, remarks.append)
    assert found == {0: "192.98.92.100", 1: "192.98.92.101", 9: "192.1.27.9"}
    assert origin == f"{tool} and {path}"
    assert (
        remarks[0] == f"{path}: card 1 has 192.1.27.7, but {tool} says 192.98.92.101, which is used; correct the file"
    )
    assert f"exit status 1); using 192.1.27.9 of {path}" in remarks[1]
    assert len(remarks) == 2


def test_a_tool_that_fails_leaves_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hccn, "_TIMEOUT", 0.2)
    for text in ("#!/no/such/shell\n", "#!/bin/sh\nexec sleep 20\n"):
        install_tool(tmp_path / "bin" / "hccn_tool", text)
        remarks: list[str] = []
        assert hccn.read_addresses([0], conf(tmp_path), remarks.append)[0] == {0: "192.1.27.6"}
        assert remarks[0].endswith(f"; using {tmp_path}/hccn.conf")


def test_the_default_file_is_found(tmp_path):
    hccn.HCCN_CONF.parent.mkdir()
    hccn.HCCN_CONF.write_text("address_0=192.1.27.6\n")
    assert hccn.read_addresses([0]) == ({0: "192.1.27.6"}, str(hccn.HCCN_CONF))


def test_addresses_from_the_tool_alone(tool):
    remarks: list[str] = []
    found, origin = hccn.read_addresses(range(8), None, remarks.append)
    assert found == {card: f"192.98.92.10{card}" for card in range(8)}
    assert (origin, remarks) == (str(tool), [])
    assert (tool.parent / "calls").read_text().splitlines() == [f"-i {card} -ip -g" for card in range(8)]


def test_the_tool_is_asked_for_what_the_file_lacks(tmp_path, tool):
    path = conf(tmp_path, cards=[0, 1, 2, 4])
    install_tool(tool, TOOL.replace("[0-7])", "3)"))
    remarks: list[str] = []
    found, origin = hccn.read_addresses(range(5), path, remarks.append)
    assert found == {0: "192.1.27.6", 1: "192.1.27.7", 2: "192.1.27.8", 3: "192.98.92.103", 4: "192.1.27.10"}
    assert list(found) == [0, 1, 2, 3, 4]
    assert origin == f"{tool} and {path}"
    assert remarks[-1] == f"{path}: has no address of card 3; using hccn_tool for it"


def test_the_tool_is_found_where_drivers_put_it(tmp_path):
    driver = install_tool(tmp_path / "driver" / "hccn_tool")
    assert hccn.read_addresses([2])[1] == str(driver)


def test_a_card_in_neither_place_is_named_with_both(tmp_path, tool):
    path = conf(tmp_path)
    with pytest.raises(RankTableError) as error:
        hccn.read_addresses(range(6, 10), path)
    text = str(error.value)
    assert text.startswith(f"cards 8-9: no address. {path}: no address_8= line. {tool}: -i 8 -ip -g said ")
    assert "hccn_tool -i 8 -ip -s address" in text
    assert '"device id 8 is invalid" (exit status 1)' in text or '"Cmd returns error" (exit status 1)' in text


def test_neither_file_nor_tool(tmp_path):
    with pytest.raises(RankTableError) as error:
        hccn.read_addresses([3])
    assert str(error.value).startswith(
        f"card 3: no address. {hccn.HCCN_CONF}: cannot be read (No such file or directory). "
        f"hccn_tool: neither on PATH nor {tmp_path}/driver/hccn_tool. Set one: "
    )


def test_a_file_that_was_named_must_be_there(tmp_path, tool):
    with pytest.raises(RankTableError, match="none: --hccn_conf: cannot be read: No such file"):
        hccn.read_addresses([0], tmp_path / "none")
    with pytest.raises(RankTableError, match="--hccn_conf: cannot be read: Is a directory"):
        hccn.read_addresses([0], tmp_path)


def test_a_default_file_that_cannot_be_read_is_noted(tool):
    hccn.HCCN_CONF.mkdir(parents=True)  # permissions would not stop root
    remarks: list[str] = []
    assert hccn.read_addresses([0], None, remarks.append)[0] == {0: "192.98.92.100"}
    assert remarks == [f"{hccn.HCCN_CONF}: cannot be read (Is a directory); using hccn_tool"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("address_0=\n", r"hccn\.conf:1: 'address_0=': write it as address_0=192\.98\.92\.107"),
        ("\naddress_zero=1.1.1.1\n", r"hccn\.conf:2: 'address_zero=1\.1\.1\.1': write it as"),
        ("address_0 192.1.27.6\n", r"hccn\.conf:1: .* write it as"),
        ("address_0=192.1.27.6 # first\n", r"hccn\.conf:1: .* write it as"),
        ("address_0=192.1.27.6\naddress_0=192.1.27.7\n", r"hccn\.conf:2: card 0 has two addresses, .*6 and .*7"),
        ("address_0=192.1.27.300\n", r"hccn\.conf: card 0: '192\.1\.27\.300' is not an IP address"),
        ("address_0=0.0.0.0\n", r"hccn\.conf: card 0: 0\.0\.0\.0 is not the address"),
        ("address_0=192.1.27.6\naddress_1=192.1.27.6\n", r"hccn\.conf: cards 0 and 1 have the same address, 192\.1\."),
    ]
)  # fmt: skip
def test_wrong_lines_of_the_file(tmp_path, text, message):
    with pytest.raises(RankTableError, match=message):
        hccn.read_addresses([0, 1] if "address_1" in text else [0], conf(tmp_path, text))


def test_the_same_line_twice_is_one_address(tmp_path):
    path = conf(tmp_path, "address_0=192.1.27.6\naddress_0=192.1.27.6\n")
    assert hccn.read_addresses([0], path)[0] == {0: "192.1.27.6"}


def test_one_address_in_both_places(tmp_path, tool):
    path = conf(tmp_path, "address_0=192.98.92.101\n")
    install_tool(tool, TOOL.replace("[0-7])", "1)"))
    with pytest.raises(
        RankTableError, match=r"hccn_tool and .*hccn\.conf: cards 0 and 1 have the same address, 192\.98\.92\.101"
    ):
        hccn.read_addresses([0, 1], path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\n", r"said nothing \(exit status 0\)"),
        ("#!/bin/sh\necho 'netmask:255.255.255.0'\n", r'said "netmask:255\.255\.255\.0" \(exit status 0\)'),
        ("#!/bin/sh\necho 'ipaddr:1.1.1.1'; exit 3\n", r"\(exit status 3\)"),
        ("#!/bin/sh\necho 'ipaddr:nonsense'\n", "hccn_tool: card 0: 'nonsense' is not an IP address"),
        ("#!/no/such/shell\n", "hccn_tool: cannot be started: No such file"),
    ],
)
def test_a_tool_that_does_not_answer(tmp_path, text, message):
    install_tool(tmp_path / "bin" / "hccn_tool", text)
    with pytest.raises(RankTableError, match=message):
        hccn.read_addresses([0])


def test_a_tool_that_hangs(tmp_path, monkeypatch):
    install_tool(tmp_path / "bin" / "hccn_tool", "#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(hccn, "_TIMEOUT", 0.2)
    with pytest.raises(RankTableError, match=r"hccn_tool -i 0 -ip -g: no answer for 0\.2 s; .*--hccn_conf"):
        hccn.read_addresses(range(8))


def name_stands_for(monkeypatch, *addresses: str, route: str | None = None) -> None:
    def look_up(*_, **__):
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hccn, "_route_address", lambda: route)


@pytest.mark.parametrize(
    ("named", "address"),
    [
        (["10.0.0.1"], "10.0.0.1"),
        (["127.0.1.1", "10.0.0.1", "10.0.0.1"], "10.0.0.1"),
        (["fe80::1%eth0", "fd00::1", "10.0.0.1"], "10.0.0.1"),
        (["::1", "fd00::1"], "fd00::1"),
    ],
)
def test_address_of_the_host(monkeypatch, named, address):
    name_stands_for(monkeypatch, *named)
    assert hccn.host_address() == address


@pytest.mark.parametrize(
    ("named", "route", "message"),
    [
        (
            ["127.0.1.1"],
            "10.0.0.1",
            r"resolves to 127\.0\.1\.1, where no other .* --server_ip, perhaps 10\.0\.0\.1",
        ),
        (["127.0.1.1"], None, r"\(node\) resolves to 127\.0\.1\.1, .* as --server_ip$"),
        ([], None, "resolves to no address"),
        (
            ["10.0.0.1", "10.0.1.1"],
            None,
            r"several addresses: 10\.0\.0\.1, 10\.0\.1\.1; give one as --server_ip",
        ),
    ],
)
def test_no_address_of_the_host(monkeypatch, named, route, message):
    name_stands_for(monkeypatch, *named, route=route)
    with pytest.raises(RankTableError, match=message):
        hccn.host_address()


def test_the_address_of_the_route_is_one():
    found = hccn._route_address()
    assert found is None or socket.inet_aton(found)


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path):
    path = conf(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert hccn.read_hccn_conf(path) == {card: f"192.1.27.{card + 6}" for card in range(8)}
