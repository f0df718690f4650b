"""Rank tables: the documented format, merges, and everything that is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from glm_ms.launch.rank_table import (
    Device,
    RankTable,
    RankTableError,
    Server,
    check_address,
    merge,
    name_numbers,
    read_rank_table,
    single_server,
    validate,
    write_rank_table,
)


def addresses(server: int, cards: int = 8) -> dict[int, str]:
    return {card: f"192.{server}.27.{card + 6}" for card in range(cards)}


def table_of(server: int, cards: int = 8) -> RankTable:
    return single_server(f"10.0.0.{server}", addresses(server, cards))


@pytest.fixture
def write(tmp_path: Path):
    """Writes a document, or bytes, as a file and returns its path."""

    def to_file(document: object, name: str = "hccl.json") -> Path:
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        (tmp_path / name).write_bytes(text)
        return tmp_path / name

    return to_file


# Two servers of two cards each, as the CANN documentation has it.
DOCUMENTED = {
    "status": "completed",
    "version": "1.0",
    "server_count": "2",
    "server_list": [
        {
            "server_id": f"node_{server}",
            "device": [
                {"device_id": "0", "device_ip": f"192.168.{server + 1}.8", "rank_id": str(2 * server)},
                {"device_id": "1", "device_ip": f"192.168.{server + 1}.9", "rank_id": str(2 * server + 1)},
            ],
        }
        for server in range(2)
    ],
}


def changed(path: str, value: object) -> dict:
    """The documented table with another value at a path such as "server_list.0.server_id"; None removes it."""
    document = copy.deepcopy(DOCUMENTED)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = document
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


def test_the_file_of_one_server_is_the_documented_one(tmp_path):
    write_rank_table(single_server("10.0.0.1", {0: "192.1.27.6", 1: "192.2.27.6"}), tmp_path / "hccl.json")
    assert json.loads((tmp_path / "hccl.json").read_text()) == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": "0", "device_ip": "192.1.27.6", "rank_id": "0"},
                    {"device_id": "1", "device_ip": "192.2.27.6", "rank_id": "1"},
                ],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["hccl.json"]


def test_ranks_go_by_the_order_of_the_cards():
    table = single_server("10.0.0.1", {7: "192.1.1.7", 4: "192.1.1.4"})
    assert [(device.device_id, device.rank_id) for device in table.servers[0].devices] == [(7, 0), (4, 1)]


def test_the_documented_example_is_read(write):
    path = write(DOCUMENTED)
    table = read_rank_table(path)
    assert [server.server_id for server in table.servers] == ["node_0", "node_1"]
    assert table.servers[1].devices[0] == Device(device_id=0, device_ip="192.168.2.8", rank_id=2)
    assert (table.rank_size, table.source) == (4, str(path))


def test_what_is_written_is_read_again(tmp_path):
    table = merge([table_of(1), table_of(2)])
    write_rank_table(table, tmp_path / "a.json")
    assert read_rank_table(tmp_path / "a.json") == table


def test_servers_and_cards_are_read_in_the_order_of_ranks(write):
    document = copy.deepcopy(DOCUMENTED)
    document["server_list"].reverse()
    document["server_list"][0]["device"].reverse()
    table = read_rank_table(write(document))
    assert [server.server_id for server in table.servers] == ["node_0", "node_1"]
    assert [device.rank_id for server in table.servers for device in server.devices] == [0, 1, 2, 3]


def test_further_keys_of_servers_and_cards_are_kept(write):
    document = changed("server_list.0.device.1.device_port", "16666")
    document["server_list"][1]["host_ip"] = "172.16.0.100"
    again = json.loads(read_rank_table(write(document)).to_json())
    assert again["server_list"][0]["device"][1]["device_port"] == "16666"
    assert again["server_list"][1]["host_ip"] == "172.16.0.100"


@pytest.mark.parametrize("count", [2, 12])
def test_merge_of_servers_with_eight_cards(count):
    numbers = list(range(count, 0, -1))  # not the alphabetical order: the order given counts
    merged = merge([table_of(number) for number in numbers])
    document = json.loads(merged.to_json())
    assert document["server_count"] == str(count)
    assert [server["server_id"] for server in document["server_list"]] == [f"10.0.0.{n}" for n in numbers]
    devices = [device for server in document["server_list"] for device in server["device"]]
    assert [device["rank_id"] for device in devices] == [str(rank) for rank in range(8 * count)]
    assert [device["device_id"] for device in devices] == [str(card) for card in range(8)] * count
    assert devices[8]["device_ip"] == f"192.{numbers[1]}.27.6"
    assert merged.rank_size == 8 * count


def test_merge_goes_on_from_a_merge():
    assert merge([merge([table_of(1), table_of(2)]), table_of(3)]) == merge([table_of(1), table_of(2), table_of(3)])


def test_merge_keeps_the_order_of_cards_within_a_server():
    mixed = single_server("10.0.0.2", {1: "192.2.27.7", 0: "192.2.27.6"})
    merged = merge([table_of(1, 2), mixed])
    assert [(device.device_id, device.rank_id) for device in merged.servers[1].devices] == [(1, 2), (0, 3)]


def from_files(write, *tables: RankTable) -> list[RankTable]:
    letters = "abc"
    return [
        read_rank_table(write(table.to_json().encode(), f"{letters[number]}.json"))
        for number, table in enumerate(tables)
    ]


def test_merge_refuses_two_files_of_one_server_and_names_them(write, tmp_path):
    with pytest.raises(RankTableError) as error:
        merge(from_files(write, table_of(1), table_of(1)))
    assert str(error.value) == (
        f"cannot be merged: server 10.0.0.1 is there twice: in {tmp_path}/a.json and in {tmp_path}/b.json"
    )


def test_merge_names_the_file_of_an_earlier_merge(write):
    with pytest.raises(
        RankTableError, match=r"c\.json has several servers: is it the result of an earlier merge"
    ) as error:
        merge(from_files(write, table_of(1), table_of(2), merge([table_of(1), table_of(2)])))
    assert "server 10.0.0.2 is there twice" in str(error.value)


def test_merge_refuses_one_address_on_two_servers(write):
    twin = single_server("10.0.0.2", addresses(1))
    with pytest.raises(RankTableError) as error:
        merge(from_files(write, table_of(1), twin))
    text = str(error.value)
    assert "192.1.27.6 (cards 0 and 0)" in text
    assert "and 5 more; each card" in text
    assert "10.0.0.1 (" in text
    assert "b.json) both have" in text


def test_merge_sees_through_spellings_of_an_address():
    tables = [single_server("10.0.0.1", {0: "fd00::1"}), single_server("10.0.0.2", {0: "fd00:0::1"})]
    with pytest.raises(RankTableError, match="both have device_ip"):
        merge(tables)
    with pytest.raises(RankTableError, match="server fd00:0::1 is there twice"):
        merge([single_server("fd00::1", {0: "192.1.1.1"}), single_server("fd00:0::1", {0: "192.1.1.2"})])


def test_merge_refuses_differing_numbers_of_cards():
    with pytest.raises(RankTableError, match=r"10\.0\.0\.1 \(table 0\) has 8, 10\.0\.0\.2 \(table 1\) has 4"):
        merge([table_of(1), table_of(2, 4)])


def test_merge_refuses_servers_that_only_they_can_reach():
    with pytest.raises(RankTableError, match=r"127\.0\.0\.1 \(table 1\): a loopback address"):
        merge([table_of(1), single_server("127.0.0.1", addresses(2))])


@pytest.mark.parametrize("tables", [[], [table_of(1)]])
def test_merge_needs_two_tables(tables):
    with pytest.raises(RankTableError, match=f"{len(tables)} rank table given: nothing to merge"):
        merge(tables)


def test_merge_checks_what_it_is_given():
    gap = RankTable((Server("10.0.0.2", (Device(0, "192.2.2.2", 0), Device(1, "192.2.2.3", 2))),), source="b.json")
    with pytest.raises(RankTableError, match=r"b\.json: rank_id missing: 1; the ranks of 2 cards go from 0 to 1"):
        merge([table_of(1, 2), gap])


REFUSED_VALUES = [
    ("version", "1.2", r'version is "1.2"; only "1.0" is supported'),
    ("version", 1.0, 'version: is a number, but a string is needed; all values .* write "1.0"'),
    ("version", None, "version: is missing$"),
    ("status", "initializing", 'status is "initializing", not "completed"'),
    ("status", None, "status: is missing$"),
    ("server_count", "3", "server_count is 3, but server_list has 2 servers"),
    ("server_count", 2, 'server_count: is a number, .* write "2"'),
    ("server_list", {}, "server_list: is an object, but a list is needed"),
    ("server_list.0", "node_0", r"server_list\[0\]: a string, but an object is needed"),
    ("server_list.1.server_id", None, r"server_list\[1\]\.server_id: is missing$"),
    ("server_list.1.server_id", "node_0", "server node_0 is there twice"),
    ("server_list.1.server_id", " ", "a server has an empty server_id"),
    ("server_list.1.server_id", "n" * 65, "longer than 64 characters"),
    ("server_list.1.device", [], "server node_1: has no cards"),
    ("server_list.0.device.1.device_id", 1, r'\[0\]\.device\[1\]\.device_id: is a number, .* write "1"'),
    ("server_list.0.device.1.device_id", "01", 'device_id: "01" is not a whole number from 0'),
    ("server_list.0.device.1.device_id", "-1", 'device_id: "-1" is not a whole number'),
    ("server_list.0.device.1.device_id", "٣", "is not a whole number"),
    ("server_list.0.device.1.device_id", True, "is true or false, but a string is needed$"),
    ("server_list.0.device.1.device_id", "0", "server node_0: device_id 0 is there twice"),
    (
        "server_list.0.device.1.device_ip",
        "192.168.1",
        r"card 1: device_ip '192\.168\.1' is not an IP address",
    ),
    ("server_list.0.device.1.device_ip", "0.0.0.0", "device_ip 0.0.0.0 is not the address of one"),
    (
        "server_list.0.device.1.device_ip",
        "192.168.1.8",
        r"node_0 has device_ip 192\.168\.1\.8 \(cards 0 and 1\)",
    ),
    (
        "server_list.1.device.1.device_ip",
        "192.168.1.8",
        r"node_0 and node_1 both have device_ip 192\.168\.1\.8",
    ),
    ("server_list.0.device.1.rank_id", 1, r'rank_id: is a number, .* write "1"'),
    ("server_list.1.device.1.rank_id", "2", r"rank_id there twice: 2; rank_id missing: 3"),
    ("server_list.1.device.1.rank_id", "5", r"rank_id missing: 3; the ranks of 4 cards go from 0 to 3"),
    ("server_list.0.device.0.rank_id", "4", r"rank_id missing: 0"),
    ("group_list", [], "template 2"),
    ("stauts", "completed", 'unknown key "stauts"; a rank table has'),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED_VALUES)
def test_reading_refuses_and_names_the_file(write, path, value, message):
    file = write(changed(path, value))
    with pytest.raises(RankTableError, match=message) as error:
        read_rank_table(file)
    assert str(error.value).startswith(f"{file}:")


def test_reading_refuses_ranks_of_one_server_with_gaps(write):
    document = changed("server_list.0.device.1.rank_id", "2")
    document["server_list"][1]["device"][0]["rank_id"] = "1"
    with pytest.raises(RankTableError, match="server node_0: its ranks are 0, 2, with gaps"):
        read_rank_table(write(document))


def test_reading_refuses_servers_of_differing_sizes(write):
    with pytest.raises(RankTableError, match="node_0 has 2, node_1 has 1"):
        read_rank_table(write(changed("server_list.1.device.1", None)))


def test_a_misspelt_key_is_recognized(write):
    document = changed("server_list.0.device.0.rank_id", None)
    document["server_list"][0]["device"][0]["rank"] = "0"
    with pytest.raises(RankTableError, match=r'device\[0\]\.rank_id: is missing; did you mean this by "rank"\?'):
        read_rank_table(write(document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", ": empty; expected a JSON value"),
        (b'{"version": "1.0",\n "status" "completed"}', ":2: not valid JSON: .* at column 11"),
        (b"\xff\xfe{\x00}\x00", ": is UTF-16 text, not UTF-8"),
        (b"[]", "a list, but an object is needed"),
        (b"{}", "not a rank table: none of the keys version"),
        (b'{"rope": 1}', "not a rank table"),
        (b'{"version": "1.0", "version": "1.0"}', 'key "version" twice in one object'),
        (b"[" * 100_000, "not valid JSON"),
        (
            b'{"version": "1.0", "status": "completed", "server_count": "0", "server_list": []}',
            "has no servers",
        ),
    ],
)
def test_reading_refuses_other_files(write, text, message):
    file = write(text)
    with pytest.raises(RankTableError, match=message) as error:
        read_rank_table(file)
    assert str(error.value).startswith(f"{file}:")


def test_reading_refuses_what_is_no_file(tmp_path):
    with pytest.raises(RankTableError, match=r"none\.json: no such file; make it with tools/hccl_tools.py"):
        read_rank_table(tmp_path / "none.json")
    with pytest.raises(RankTableError, match="is a folder; give a file"):
        read_rank_table(tmp_path)


def test_a_byte_order_mark_does_no_harm(write):
    assert read_rank_table(write(b"\xef\xbb\xbf" + json.dumps(DOCUMENTED).encode())).rank_size == 4


def test_a_table_of_nothing_is_refused():
    with pytest.raises(RankTableError, match=r"server 10\.0\.0\.1: has no cards"):
        single_server("10.0.0.1", {})
    with pytest.raises(RankTableError, match="rank table: has no servers"):
        validate(RankTable(()))


def test_only_the_first_problems_are_told():
    with pytest.raises(RankTableError, match=r"'x4' is not an IP address; and 3 more$"):
        single_server("10.0.0.1", {card: f"x{card}" for card in range(8)})


def test_writing_replaces_only_when_told(tmp_path):
    path = tmp_path / "a.json"
    write_rank_table(table_of(1), path)
    with pytest.raises(RankTableError, match=r"a\.json: exists already; choose another name, or add overwrite=True"):
        write_rank_table(table_of(2), path)
    assert read_rank_table(path) == table_of(1)
    write_rank_table(table_of(2), path, overwrite=True)
    assert read_rank_table(path) == table_of(2)


def test_writing_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(RankTableError, match="is a folder, but a file is to be written"):
        write_rank_table(table_of(1), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RankTableError, match="file is a file, not a folder"):
        write_rank_table(table_of(1), tmp_path / "file" / "a.json")
    (tmp_path / "file").unlink()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RankTableError, match=r"a\.json: cannot be written: No space left on device"):
        write_rank_table(table_of(1), tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["192.98.92.107", "fd00::7", "169.254.1.1"])
def test_addresses_of_cards(text):
    assert check_address(text) == text


@pytest.mark.parametrize(
    "text", ["", "1", "10.0.0.256", "10.0.0.1/24", "10.0.0.1 ", "fe80::1%eth0", "::",
     "224.0.0.1", "255.255.255.255", "127.0.0.1"]
)  # fmt: skip
def test_what_is_no_address_of_a_card(text):
    with pytest.raises(RankTableError):
        check_address(text)


def test_numbers_for_messages():
    assert name_numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert name_numbers([3, 2]) == "3, 2"
