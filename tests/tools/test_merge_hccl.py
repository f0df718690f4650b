"""The command line, run as a user runs it, on the tables of the other tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glm_ms.launch.rank_table import read_rank_table, single_server, write_rank_table


@pytest.fixture
def run(repository: Path, tmp_path: Path):
    """Runs the tool in the folder of the tables."""

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repository / "tools" / "merge_hccl.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return start


def make(folder: Path, server: int, cards: int = 8) -> str:
    """Writes the table of one server; returns its name."""
    logical = "".join(map(str, range(cards)))
    name = f"hccl_{cards}p_{logical}_10.0.0.{server}.json"
    addresses = {card: f"192.{server}.27.{card + 6}" for card in range(cards)}
    write_rank_table(single_server(f"10.0.0.{server}", addresses), folder / name)
    return name


@pytest.mark.parametrize("count", [2, 12])
def test_servers_of_eight_cards(run, tmp_path, count):
    names = [make(tmp_path, server) for server in range(1, count + 1)]
    done = run(*names)
    output = f"hccl_{count}s_{8 * count}p.json"
    assert (done.returncode, done.stderr) == (0, "")
    order = ", ".join(f"10.0.0.{server}" for server in range(1, count + 1))
    assert done.stdout == f"{output}: {count} servers, {8 * count} cards, in the order {order}\n"
    document = json.loads((tmp_path / output).read_text())
    assert document["server_count"] == str(count)
    assert document["server_list"][1]["device"][0] == {
        "device_id": "0",
        "device_ip": "192.2.27.6",
        "rank_id": "8",
    }
    assert {server["host_nic_ip"] for server in document["server_list"]} == {"reserve"}
    assert read_rank_table(tmp_path / output).rank_size == 8 * count


def test_the_order_given_is_kept(run, tmp_path):
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    assert run(second, first, "--output", "all.json").returncode == 0
    assert [server.server_id for server in read_rank_table(tmp_path / "all.json").servers] == [
        "10.0.0.2",
        "10.0.0.1",
    ]


def test_an_existing_file_stays_unless_told(run, tmp_path):
    names = [make(tmp_path, 1), make(tmp_path, 2)]
    (tmp_path / "hccl_2s_16p.json").write_text("mine")
    done = run(*names)
    assert done.returncode == 1
    assert done.stderr.startswith("error: hccl_2s_16p.json: exists already")
    assert (tmp_path / "hccl_2s_16p.json").read_text() == "mine"
    assert run(*names, "--overwrite").returncode == 0


def test_a_second_merge_of_everything_names_the_first(run, tmp_path):
    names = [make(tmp_path, 1), make(tmp_path, 2)]
    assert run(*names).returncode == 0
    done = run(*sorted(path.name for path in tmp_path.glob("hccl*.json")), "--overwrite")
    assert done.returncode == 1
    assert "hccl_2s_16p.json has several servers: is it the result of an earlier merge?" in done.stderr


def test_what_is_refused(run, tmp_path):
    first, second, small = make(tmp_path, 1), make(tmp_path, 2), make(tmp_path, 3, cards=4)
    (tmp_path / "copy.json").write_text((tmp_path / first).read_text())
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "gap.json").write_text((tmp_path / second).read_text().replace('"rank_id": "7"', '"rank_id": "9"'))
    before = sorted(tmp_path.iterdir())
    for arguments, message in [
        ((first,), "error: 1 rank table given: nothing to merge"),
        ((first, f"./{first}"), f"error: ./{first}: given twice"),
        (
            (first, "copy.json"),
            f"error: cannot be merged: server 10.0.0.1 is there twice: in {first} and in copy.json",
        ),
        (
            (first, small),
            f"error: cannot be merged: servers differ in their numbers of cards (10.0.0.1 ({first}) has 8",
        ),
        ((first, "broken.json"), "error: broken.json:1: not valid JSON"),
        ((first, "gap.json"), "error: gap.json: rank_id missing: 7; the ranks of 8 cards go from 0 to 7"),
        ((first, "hccl*.json"), "error: hccl*.json: no such file"),
        ((first, second, "--output", "."), "error: .: is a folder"),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith(message)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_usage(run):
    done = run()
    assert done.returncode == 2
    assert "the following arguments are required: FILE" in done.stderr
    assert "Example: python tools/merge_hccl.py" in run("--help").stdout
