"""The command line, run as a user runs it, with stand-ins for hccn_tool and hccn.conf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_ms.launch.rank_table import read_rank_table

TOOL = '#!/bin/sh\nprintf "ipaddr:192.98.92.10%s\\nnetmask:255.255.255.0\\n" "$2"\n'


@pytest.fixture
def run(repository: Path, tmp_path: Path):
    """Runs the tool in an empty folder with an hccn_tool on PATH."""
    tool = tmp_path / "bin" / "hccn_tool"
    tool.parent.mkdir()
    tool.write_text(TOOL)
    tool.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(repository / "tools" / "hccl_tools.py"), *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "hccn.conf"
    path.write_text("".join(f"address_{card}=192.98.92.10{card}\nnetmask_{card}=255.255.255.0\n" for card in range(8)))
    return path


def test_where_file_and_tool_differ_the_tool_counts(run, conf, tmp_path):
    conf.write_text(conf.read_text().replace("192.98.92.103", "192.98.92.203"))
    done = run("--server_ip", "10.0.0.1", "--hccn_conf", conf, "--output", "new/one.json")
    assert done.returncode == 0
    assert done.stderr.startswith(f"note: {conf}: card 3 has 192.98.92.203, but ")
    table = read_rank_table(tmp_path / "folder" / "new" / "one.json")
    assert table.servers[0].devices[3].device_ip == "192.98.92.103"


def test_eight_cards_from_the_file(run, conf, tmp_path):
    done = run("--device_num", "[0,8)", "--server_ip", "10.0.0.1", "--hccn_conf", conf)
    name = "hccl_8p_01234567_10.0.0.1.json"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{name}: server 10.0.0.1, cards 0-7 as ranks 0-7, addresses from {conf}\n"
    assert json.loads((tmp_path / "folder" / name).read_text()) == {
        "version": "1.0",
        "server_count": "1",
        "server_list": [
            {
                "server_id": "10.0.0.1",
                "device": [
                    {"device_id": str(card), "device_ip": f"192.98.92.10{card}", "rank_id": str(card)}
                    for card in range(8)
                ],
                "host_nic_ip": "reserve",
            }
        ],
        "status": "completed",
    }


@pytest.mark.skipif(Path("/etc/hccn.conf").exists(), reason="this machine has an hccn.conf, which comes first")
def test_eight_cards_from_the_tool_by_default(run, tmp_path):
    done = run("--server_ip", "fd00::1")
    assert done.returncode == 0, done.stderr
    assert f"addresses from {tmp_path}/bin/hccn_tool" in done.stdout
    table = read_rank_table(tmp_path / "folder" / "hccl_8p_01234567_fd00--1.json")
    assert table.servers[0].server_id == "fd00::1"
    assert [device.device_ip for device in table.servers[0].devices] == [f"192.98.92.10{n}" for n in range(8)]


def test_visible_devices_are_physical_and_the_name_is_logical(run, conf, tmp_path):
    arguments = (
        "--device_num",
        "[0,2)",
        "--visible_devices",
        "6,7",
        "--server_ip",
        "10.0.0.1",
        "--hccn_conf",
        conf,
    )
    done = run(*arguments)
    assert done.stdout.startswith("hccl_2p_01_10.0.0.1.json: server 10.0.0.1, cards 6-7 as ranks 0-1, ")
    devices = read_rank_table(tmp_path / "folder" / "hccl_2p_01_10.0.0.1.json").servers[0].devices
    assert [(item.device_id, item.device_ip, item.rank_id) for item in devices] == [
        (6, "192.98.92.106", 0),
        (7, "192.98.92.107", 1),
    ]


def test_one_card_with_its_output(run, conf, tmp_path):
    done = run("--device_num", "[3,4)", "--server_ip", "127.0.0.1", "--hccn_conf", conf, "--output", "one.json")
    assert done.stdout == f"one.json: server 127.0.0.1, card 3 as rank 0, addresses from {conf}\n"
    assert read_rank_table(tmp_path / "folder" / "one.json").rank_size == 1


def test_an_existing_file_stays_unless_told(run, conf, tmp_path):
    arguments = ("--server_ip", "10.0.0.1", "--hccn_conf", conf, "--output", "a.json")
    (tmp_path / "folder" / "a.json").write_text("mine")
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a.json: exists already; choose another name, or add --overwrite\n"
    assert (tmp_path / "folder" / "a.json").read_text() == "mine"
    assert run(*arguments, "--overwrite").returncode == 0
    assert read_rank_table(tmp_path / "folder" / "a.json").rank_size == 8


def test_cards_of_both_halves_are_noted_and_made(run, conf):
    done = run("--device_num", "[3,6)", "--server_ip", "10.0.0.1", "--hccn_conf", conf)
    assert done.returncode == 0
    assert done.stderr.startswith("note: cards 3-5 are of both halves")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device_num", "[0,8]"), 'error: --device_num "[0,8]": the end is not part of a range'),
        (
            ("--device_num", "[0,4)", "--visible_devices", "0,1"),
            "error: --device_num asks for logical cards 0-3",
        ),
        (("--visible_devices", "0,0"), 'error: --visible_devices "0,0": card 0 is there twice'),
        (("--server_ip", "node7"), "error: --server_ip: 'node7' is not an IP address; give it as 10.0.0.1"),
        (("--hccn_conf", "none"), "error: none: --hccn_conf: cannot be read"),
        (("--output", "/dev/null/a.json"), "error: /dev/null/a.json: /dev/null is a file, not a folder"),
    ],
)
def test_what_is_refused(run, conf, tmp_path, arguments, message):
    defaults = {"--server_ip": "10.0.0.1", "--hccn_conf": str(conf)}
    given = dict(zip(arguments[::2], arguments[1::2]))
    done = run(*[word for pair in {**defaults, **given}.items() for word in pair])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message)
    assert list((tmp_path / "folder").iterdir()) == []


def test_wrong_usage(run):
    done = run("--server", "10.0.0.1")
    assert done.returncode == 2
    assert "unrecognized arguments: --server 10.0.0.1" in done.stderr
    for flag in ("--server_ip", "--hccn_conf", "--output"):
        done = run(flag, "")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{flag}: empty; give a value" in done.stderr
    assert "Example: python tools/hccl_tools.py" in run("--help").stdout
