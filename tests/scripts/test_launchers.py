"""scripts/run_distribute.sh, run_standalone.sh and msrun_launcher.sh, as users type them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import left_of

from glm_ms.launch.distribute import device_range, parse, this_server
from glm_ms.launch.processes import claim
from glm_ms.launch.rank_job import LaunchError
from glm_ms.launch.rank_table import RankTable, merge, single_server, write_rank_table

REPOSITORY = Path(__file__).resolve().parents[2]
# A project whose run_glm.py says what it was given, and does what a flag says.
RUN_GLM = """\
import json, os, signal, sys, time
names = ("RANK_ID", "DEVICE_ID", "RANK_SIZE", "RANK_TABLE_FILE", "MS_ROLE")
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}, os.getcwd()]), flush=True)
rank = os.environ.get("RANK_ID")
if "--ill" in sys.argv and rank == "1":
    raise ValueError("ill")
if "--killed" in sys.argv and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if {"--ill", "--killed", "--wait"} & set(sys.argv):
    time.sleep(600)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a folder with a space in its name, with a configuration and rank tables."""
    folder = tmp_path / "my project"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts")
    for name in ("glm_ms/launch", "glm_ms/storage", "glm_ms/__init__.py", "glm_ms/spelling.py", "glm_ms/version.py"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(REPOSITORY / name, folder / name)
    (folder / "run_glm.py").write_text(RUN_GLM)
    (folder / "X.yaml").write_text("")
    write_rank_table(table_of("192.0.2.50", 2), folder / "one.json")
    write_rank_table(merge([table_of("192.0.2.50", 2), table_of("192.0.2.51", 2, 16)]), folder / "two.json")
    return folder


def table_of(server: str, cards: int, base: int = 6) -> RankTable:
    return single_server(server, {card: f"198.51.100.{card + base}" for card in range(cards)})


def begin(project: Path, name: str, *arguments: str, **environment: str) -> subprocess.Popen:
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHON", "SERVER_ID")
    return subprocess.Popen(
        ["bash", project / "scripts" / name, *arguments],
        cwd=project,
        env={
            **{key: value for key, value in os.environ.items() if key not in hidden},
            "PYTHON": sys.executable, "OF_TEST": str(project), "MS_ROLE": "MS_WORKER", **environment,
        },
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )  # fmt: skip


def run(project: Path, name: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = begin(project, name, *arguments, **environment)
    shown, said = process.communicate(timeout=60)
    return process.returncode, shown, said


def log_of(project: Path, rank: int) -> list:
    return json.loads((project / "output" / "distribute_log" / f"rank_{rank}" / "run_glm.log").read_text())


def test_a_process_for_each_card(project: Path):
    status, shown, said = run(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "eval", "--seed", "3")
    assert status == 0, said
    assert json.loads(shown) == log_of(project, 0)
    for rank in (0, 1):
        words, variables, folder = log_of(project, rank)
        assert words == ["--config", "X.yaml", "--use_parallel", "True", "--run_mode", "eval", "--seed", "3"]
        assert variables == {
            "RANK_ID": str(rank), "DEVICE_ID": str(rank), "RANK_SIZE": "2",
            "RANK_TABLE_FILE": str(project / "one.json"), "MS_ROLE": None,
        }  # fmt: skip
        assert folder == str(project)


@pytest.mark.parametrize("cards", ["[0,2)", "[2,4]"])
def test_the_second_of_two_servers(project: Path, cards: str):
    status, shown, said = run(
        project, "run_distribute.sh", "two.json", "X.yaml", cards, "predict", "4", "你好", SERVER_ID="192.0.2.51"
    )
    assert status == 0, said
    words, variables, _ = json.loads(shown)
    assert words[-2:] == ["--predict_data", "你好"]
    assert (variables["RANK_ID"], variables["DEVICE_ID"], variables["RANK_SIZE"]) == ("2", "0", "4")
    assert log_of(project, 3)[1]["DEVICE_ID"] == "1"
    assert not (project / "output" / "distribute_log" / "rank_0").exists()
    assert "ranks 2-3 of 4 started" in said


@pytest.mark.parametrize(
    ("flag", "status", "reason"),
    [
        ("--ill", 1, "ValueError: ill\n\nerror: rank 1 failed (exit status 1), log: "),
        ("--killed", 137, "\n\nerror: rank 1 was ended by signal 9 (SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_the_others(project: Path, flag: str, status: int, reason: str):
    started = time.monotonic()
    found, _, said = run(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "finetune", flag)
    assert found == status
    assert reason in said
    assert time.monotonic() - started < 10
    assert left_of(project) == []


def test_an_interrupt_ends_all_ranks(project: Path):
    process = begin(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "finetune", "--wait")
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; logs: output/distribute_log" in said
    assert left_of(project) == []


def test_ranks_end_with_a_launcher_that_is_killed(project: Path):
    process = begin(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "finetune", "--wait")
    assert process.stdout.readline()
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while left_of(project):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.02)


def test_logs_of_more_ranks_do_not_stay(project: Path):
    logs = project / "output" / "distribute_log"
    for rank in (1, 2):
        (logs / f"rank_{rank}").mkdir(parents=True)
        (logs / f"rank_{rank}" / "run_glm.log").write_text(f"of a former job, {rank}")
    (logs / "rank_2" / "notes.txt").write_text("mine")
    status, _, said = run(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "eval")
    assert status == 0, said
    kept = sorted(path.read_text() for path in logs.glob("earlier/*/rank_*/run_glm.log"))
    assert kept == ["of a former job, 1", "of a former job, 2"]
    assert not (logs / "rank_2" / "run_glm.log").exists()
    assert (logs / "rank_2" / "notes.txt").exists()


def test_one_job_a_log_folder(project: Path):
    holder = claim(f"logs {(project / 'output' / 'distribute_log').resolve()}")
    assert holder is not None
    with holder:
        status, _, said = run(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "eval")
    assert status == 2
    assert "another job is writing its logs there; start this one in another folder" in said


def test_logs_that_cannot_be_written(project: Path):
    (project / "output").write_text("a file")
    status, shown, said = run(project, "run_distribute.sh", "one.json", "X.yaml", "[0,2)", "eval")
    assert (status, shown) == (2, "")
    assert said.startswith("error: output/distribute_log: logs cannot be written there (Not a directory: ")
    assert said.endswith("; start this one in another folder\n")
    assert left_of(project) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("one.json X.yaml", "2 arguments; RANK_TABLE_FILE CONFIG_PATH DEVICE_RANGE RUN_STATUS are needed"),
        ("no.json X.yaml [0,2) eval", "RANK_TABLE_FILE no.json: no such file in "),
        ("one.json Y.yaml [0,2) eval", "CONFIG_PATH Y.yaml: no such file in "),
        ("X.yaml X.yaml [0,2) eval", "X.yaml: empty; expected a JSON value"),
        (
            "X.yaml one.json [0,2) eval",
            "RANK_TABLE_FILE comes before CONFIG_PATH; did you mean one.json X.yaml?",
        ),
        (
            "one.json X.yaml [0,2) eval seed=3",
            "RANK_SIZE seed=3: not a number of cards; flags of run_glm.py begin with --",
        ),
        ("one.json X.yaml 0,2 eval", 'DEVICE_RANGE 0,2: not a range such as "[0,8)"'),
        ("one.json X.yaml [2,2) eval", "DEVICE_RANGE [2,2): not a range"),
        (
            "one.json X.yaml [0,8) eval",
            "DEVICE_RANGE names 0-7, but in one.json server 192.0.2.50 has the cards 0-1",
        ),
        ("one.json X.yaml [0,2) test", "RUN_STATUS test: must be one of train, finetune, eval, predict"),
        ("one.json X.yaml [0,2) eval 8", "RANK_SIZE 8, but one.json has 2 cards"),
        ("one.json X.yaml [0,2) eval two", "RANK_SIZE two: not a number of cards"),
        ("one.json X.yaml [0,2) eval 2 seed=3", "seed=3: one argument too many"),
        ("one.json X.yaml [0,2) predict 2", "2: with predict, the last argument is PREDICT_DATA"),
        ("two.json X.yaml [0,2) eval", "two.json: has 2 servers; for a run on all of them add RANK_SIZE 4"),
        (
            "two.json X.yaml [0,2) eval 4",
            "two.json: of its servers (0: 192.0.2.50, 1: 192.0.2.51) none has an address of this",
        ),
    ],
)
def test_wrong_arguments_start_nothing(project: Path, arguments: str, message: str):
    status, shown, said = run(project, "run_distribute.sh", *arguments.split())
    assert (status, shown) == (2, "")
    assert said.splitlines()[-1].startswith(f"error: {message}")
    assert not (project / "output").exists()


def test_which_server():
    servers = (table_of("192.0.2.50", 1).servers[0], table_of("127.0.0.1", 1, 16).servers[0])
    both = RankTable(servers)
    assert this_server(both, None).server_id == "127.0.0.1"
    assert this_server(both, "0").server_id == "192.0.2.50"
    assert this_server(both, "192.0.2.50").server_id == "192.0.2.50"
    with pytest.raises(LaunchError, match="SERVER_ID 2: not in"):
        this_server(both, "2")


def test_ranges():
    assert device_range("[0,8)") == device_range("[0, 8]") == range(8)
    assert device_range("[4,6)") == range(4, 6)


def test_predict_data_of_several_words(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project)
    request = parse(["one.json", "X.yaml", "[0,2)", "predict", "a=b c", "--batch_size", "2"])
    assert request.command[-4:] == ("--predict_data", "a=b c", "--batch_size", "2")
    assert request.rank_size is None


def test_standalone(project: Path):
    status, shown, said = run(project, "run_standalone.sh", "X.yaml", "3", "finetune", "--seed", "4")
    assert status == 0, said
    words, variables, _ = json.loads(shown)
    assert words == [
        "--config",
        "X.yaml",
        "--use_parallel",
        "False",
        "--run_mode",
        "finetune",
        "--device_id",
        "3",
        "--seed",
        "4",
    ]
    assert (variables["DEVICE_ID"], variables["MS_ROLE"], variables["RANK_ID"]) == ("3", None, None)


def test_use_parallel_is_given_once(project: Path, monkeypatch: pytest.MonkeyPatch):
    """By the user, or by the launcher."""
    monkeypatch.chdir(project)
    request = parse(["one.json", "X.yaml", "[0,2)", "eval", "--use_parallel", "True"])
    assert request.command.count("--use_parallel") == 1
    status, shown, said = run(project, "run_standalone.sh", "X.yaml", "3", "eval", "--use_parallel=False")
    assert status == 0, said
    assert [word for word in json.loads(shown)[0] if "use_parallel" in word] == ["--use_parallel=False"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("X.yaml 0", "error: 2 arguments; at least CONFIG_PATH DEVICE_ID RUN_STATUS are needed"),
        ("Y.yaml 0 eval", "error: CONFIG_PATH Y.yaml: no such file in "),
        ("X.yaml first eval", "error: DEVICE_ID first: not the number of a card"),
        ("X.yaml 0 test", "error: RUN_STATUS test: train, finetune, eval or predict"),
        ("X.yaml 0 eval seed=3", "error: seed=3: what follows RUN_STATUS begins with a --flag"),
    ],
)
def test_standalone_with_wrong_arguments(project: Path, arguments: str, message: str):
    status, shown, said = run(project, "run_standalone.sh", *arguments.split())
    assert (status, shown) == (1, "")
    assert message in said


@pytest.mark.parametrize("name", ["msrun_launcher.sh", "run_distribute.sh", "run_standalone.sh"])
def test_help(project: Path, name: str):
    status, shown, said = run(project, name)
    assert status == 2
    assert f"usage: {name} " in said
    status, shown, said = run(project, name, "--help")
    assert status == 0
    assert f"usage: {name} " in shown


def test_an_interpreter_that_is_not_there(project: Path):
    status, _, said = run(project, "msrun_launcher.sh", "run_glm.py", PYTHON="/no/python")
    assert status == 1
    assert "PYTHON=/no/python is not there" in said


def test_an_interpreter_without_mindspore(project: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=60)
    bare = str(tmp_path / "bare" / "bin" / "python")
    status, _, said = run(project, "msrun_launcher.sh", "run_glm.py --config X.yaml", "2", PYTHON=bare)
    assert status == 2
    assert f"error: {bare} has no MindSpore; activate the environment that has it" in said
    assert not (project / "output").exists()
