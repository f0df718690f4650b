"""Arguments of the msrun launcher, and what it asks of the machine before it starts anything."""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path

import pytest

from glm_ms.launch import msrun
from glm_ms.launch.msrun import Job, check_machine, check_workers, msrun_command, parse, reserve_port
from glm_ms.launch.rank_job import JOB_VARIABLES, LaunchError, job_environment


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run me.py").write_text("")
    (tmp_path / "run.py").write_text("")
    return "run.py"


def test_one_argument_takes_eight_ranks(script: str):
    assert parse([f"{script} --a 1"]) == Job(("run.py", "--a", "1"), 8, 8, "127.0.0.1", None, 0)
    job = parse([script])
    assert (str(job.log_dir), job.join, job.cluster_time_out) == ("output/msrun_log", True, 7200)


def test_two_arguments_take_that_many(script: str):
    assert parse([script, "2"]) == Job(("run.py",), 2, 2)


def test_six_arguments_are_for_one_server(script: str):
    job = parse([script, "4", "9000", "logs here", "False", "60"])
    assert job == Job(("run.py",), 4, 4, "127.0.0.1", 9000, 0, Path("logs here"), False, 60)


def test_nine_arguments_are_for_many_servers(script: str):
    job = parse([script, "16", "8", "192.0.2.9", "9000", "1", "logs", "True", "60"])
    assert job == Job(("run.py",), 16, 8, "192.0.2.9", 9000, 1, Path("logs"), True, 60)
    assert [path.name for path in job.logs.values()] == [*(f"worker_{n}.log" for n in range(8, 16)), "msrun_node_1.log"]


@pytest.mark.parametrize("number", [6, 7, 8])
def test_many_servers_without_the_last_arguments(script: str, number: int):
    words = [script, "16", "8", "192.0.2.9", "8118", "1", "logs", "False"][:number]
    job = parse(words)
    assert (job.worker_num, job.local_worker, job.master_addr, job.master_port, job.node_rank) == (
        16, 8, "192.0.2.9", 8118, 1,
    )  # fmt: skip
    assert (str(job.log_dir), job.join) == (
        "output/msrun_log" if number < 7 else "logs",
        number < 8,
    )


def test_quotes_within_the_first_argument(script: str):
    assert parse(["python 'run me.py' --predict_data \"你 好\""]).command == (
        "run me.py",
        "--predict_data",
        "你 好",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.py", "8", "8118"], "3 arguments; there are forms with 1, 2, 6, and for many servers 6 to 9"),
        (["run.py --a 'b"], "quotes do not match"),
        ([""], "the first argument is empty"),
        (["python"], "the first argument is empty"),
        (["msrun run.py"], "the launcher calls msrun itself"),
        (["--worker_num 8 run.py"], "begins with a Python script"),
        (["2", "run.py"], "2: not a script; the first argument is the script with its arguments in quotes"),
        (["missing.py"], "missing.py: no such file in "),
        (["run_glm.py"], "cd "),
        (["run.py", "0"], "WORKER_NUM 0: must be at least 1"),
        (["run.py", "two"], "WORKER_NUM two: not a whole number"),
        (["run.py", "8*2"], "WORKER_NUM 8*2: not a whole number; write 16"),
        (["run.py", "8", "80", "logs", "True", "60"], "MASTER_PORT 80: must be 1024 to 65535"),
        (["run.py", "8", "9000", "logs", "yes", "60"], "JOIN yes: must be True or False"),
        (["run.py", "8", "9000", "", "True", "60"], "LOG_DIR is empty"),
        (["run.py", "8", "9000", "logs", "True", "1h"], "CLUSTER_TIME_OUT 1h"),
        (["run.py", "8", "80", "logs", "9000", "0"], "not a multiple of LOCAL_WORKER 80"),
        (["run.py", "16", "8", "10.0.0.1", "9000", "0", "logs", "60"], "JOIN 60: must be True or False"),
        (
            ["run.py", "12", "8", "10.0.0.1", "9000", "0", "logs", "True", "60"],
            "not a multiple of LOCAL_WORKER 8",
        ),
        (["run.py", "16", "8", "10.0.0.1", "9000", "2", "logs", "True", "60"], "there are 2 servers"),
    ],
)
def test_wrong_arguments(script: str, arguments: list[str], message: str):
    with pytest.raises(LaunchError) as caught:
        parse(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("address", "node", "message"),
    [
        ("127.0.0.1", 1, "is this server, but NODE_RANK is 1"),
        ("127.0.0.1", 0, "the other servers cannot reach it"),
        ("192.0.2.77", 0, "is not an address of this server"),
        ("no.such.host.invalid", 0, "no such host"),
    ],
)
def test_addresses_that_do_not_fit(address: str, node: int, message: str):
    with pytest.raises(LaunchError) as caught:
        check_machine(Job(("run.py",), 16, 8, address, 9000, node))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "cards", "message"),
    [("run.py", 4, "8 ranks on a server with 4 Ascend cards"), ("run.py", 0, "8 ranks on a server with 2 cores"),
     ("run.py --device_target CPU", 16, "of at most 2, or set GLM_MS_FORCE_WORKERS=1"),
     ("run.py context.device_target=CPU", 16, "8 ranks on a server with 2 cores"), ("run.py", 8, ""),
     ("run.py --predict_data CPU", 4, "8 ranks on a server with 4 Ascend cards")],
)  # fmt: skip
def test_more_ranks_than_the_server_has(line: str, cards: int, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(msrun, "usable_cores", lambda: 2)
    monkeypatch.setattr(msrun, "ascend_cards", lambda: [f"davinci{card}" for card in range(cards)])
    job = Job(tuple(line.split()))
    if message:
        with pytest.raises(LaunchError, match=message):
            check_workers(job)
        monkeypatch.setenv("GLM_MS_FORCE_WORKERS", "1")
    check_workers(job)


def test_no_mindspore(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="has no MindSpore; activate the environment that has it"):
        check_machine(Job(("run.py",)))


def test_ports(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"MASTER_PORT {port} is taken"):
            reserve_port(Job(("run.py",), master_port=port))
        # Not asked for on a server that only connects to it.
        assert reserve_port(Job(("run.py",), 16, 8, "192.0.2.1", port, 1))[0] == port
    again, holder = reserve_port(Job(("run.py",), master_port=port))
    assert again == port
    with (
        holder,
        pytest.raises(LaunchError, match="is taken"),
    ):  # by this launcher, whose scheduler has yet to begin
        reserve_port(Job(("run.py",), master_port=port))
    assert capsys.readouterr().err == ""


def test_another_port_where_none_was_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("glm_ms.launch.msrun.DEFAULT_PORT", port)
        other, holder = reserve_port(Job(("run.py",)))
    holder.close()
    assert other != port
    assert capsys.readouterr().err == f"note: port {port} is taken; using {other}\n"


@pytest.mark.parametrize(
    ("job", "moved"),
    [
        (Job(("run.py",), 2, 2), ["scheduler.log", "worker_0.log", "worker_7.log"]),
        # Other servers may be writing the other logs at the moment.
        (Job(("run.py",), 4, 2, "192.0.2.9"), ["scheduler.log", "worker_0.log"]),
    ],
)
def test_logs_of_former_jobs(tmp_path: Path, job: Job, moved: list[str]):
    job = dataclasses.replace(job, log_dir=tmp_path / "logs")
    job.make_room_for_logs()
    (created,) = job.log_dir.iterdir()
    assert created == job.logs["msrun"]
    created.unlink()
    for name in ("worker_0.log", "worker_7.log", "scheduler.log", "notes.log"):
        (job.log_dir / name).write_text("")
    job.make_room_for_logs()
    assert sorted(path.name for path in job.log_dir.glob("earlier/*/*")) == moved
    assert (job.log_dir / "notes.log").exists()


def test_log_dir_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = r"LOG_DIR .*file/logs: logs cannot be written there \(Not a directory.*; choose another folder"
    with pytest.raises(LaunchError, match=message):
        Job(("run.py",), log_dir=tmp_path / "file" / "logs").make_room_for_logs()


def test_the_log_folder_is_claimed_before_the_port(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(msrun, "Interrupts", list)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "msrun")
    log = tmp_path / "logs" / "worker_0.log"
    log.parent.mkdir()
    log.write_text("")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = [script, "2", str(port), str(log.parent), "True", "60"]
        with parse(arguments).log_folder.claim(), pytest.raises(LaunchError, match="another job is writing its logs"):
            msrun.launch(arguments)
        with pytest.raises(LaunchError, match=f"MASTER_PORT {port} is taken"):
            msrun.launch(arguments)
    assert list(log.parent.iterdir()) == [log]


def test_the_command_of_msrun():
    one = msrun_command(Job(("run.py", "--a"), 2, 2), 9000)
    assert one[-2:] == ["run.py", "--a"]
    assert "--master_addr" not in one
    assert one[one.index("--join") + 1] == "False"
    many = msrun_command(Job(("run.py",), 16, 8, "192.0.2.9", 9000, 1), 9000)
    assert " ".join(many).startswith("msrun --worker_num 16 --local_worker_num 8 --master_port 9000")
    assert many[many.index("--master_addr") + 1] == "192.0.2.9"
    assert many[many.index("--node_rank") + 1] == "1"


def test_variables_of_an_outer_job_stay_outside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert job_environment()["PATH"] == f"{Path(sys.executable).absolute().parent}:/usr/bin"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("MS_ALLOC_CONF", "a setting of the user")
    environment = job_environment()
    assert {"MS_ROLE", "RANK_ID"}.isdisjoint(environment)
    assert environment["MS_ALLOC_CONF"] == "a setting of the user"
    assert capsys.readouterr().err == "note: not passed on, as each rank gets its own: MS_ROLE, RANK_ID\n"
