"""Starts a job with msrun, watches its ranks, and ends it as a whole: the program of scripts/msrun_launcher.sh.

msrun alone either returns at once, or waits without naming the rank that failed and the reason. Here it starts the
processes and ends; the launcher adopts them, so that it receives each exit status at once.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.launch.processes import Interrupts, ascend_cards, claim_port, is_local, kill_descendants, usable_cores
from glm_ms.launch.rank_job import (
    LaunchError,
    LogFolder,
    Member,
    RankJob,
    guarded,
    job_environment,
    product_hint,
    run_command,
    say,
)
from glm_ms.launch.rank_logs import reason_in

USAGE = """\
usage: msrun_launcher.sh "SCRIPT ARGUMENTS"
       msrun_launcher.sh "SCRIPT ARGUMENTS" WORKER_NUM
       msrun_launcher.sh "SCRIPT ARGUMENTS" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       msrun_launcher.sh "SCRIPT ARGUMENTS" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK [LOG_DIR [JOIN \\
           [CLUSTER_TIME_OUT]]]

Starts a Python script once per card with msrun, shows rank 0 live, and waits. When a rank fails, or the launcher is
interrupted or killed, all ranks end; the first failing rank's traceback and log are named. The first three forms use
one server; with the last one, start it on every server, with NODE_RANK 0 on that of MASTER_ADDR.

  "SCRIPT ARGUMENTS"  one quoted word, as in "run_glm.py --config X.yaml --run_mode finetune --use_parallel True"
  WORKER_NUM          ranks on all servers together      (8)
  LOCAL_WORKER        ranks on this server               (WORKER_NUM)
  MASTER_ADDR         address of the first server        (127.0.0.1)
  MASTER_PORT         free port of the first server      (8118, or another one if that is taken)
  NODE_RANK           number of this server, from 0      (0)
  LOG_DIR             for worker_N.log, scheduler.log, msrun.log; earlier logs are kept there (output/msrun_log)
  JOIN                False: return at once, do not watch the ranks (True)
  CLUSTER_TIME_OUT    seconds until all ranks must have connected (7200)

A server starts at most as many ranks as it has Ascend cards, or cores if it has none; GLM_MS_FORCE_WORKERS=1 in the
environment allows more.
"""
_ONE_SERVER = ("WORKER_NUM", "MASTER_PORT", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT")
_MANY_SERVERS = (
    "WORKER_NUM", "LOCAL_WORKER", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT",
)  # fmt: skip
# Least and most value of the whole numbers.
_LIMITS = {
    "WORKER_NUM": (1, None),
    "LOCAL_WORKER": (1, None),
    "MASTER_PORT": (1024, 65535),
    "NODE_RANK": (0, None),
    "CLUSTER_TIME_OUT": (1, None),
}
DEFAULT_PORT = 8118
FORCE = "GLM_MS_FORCE_WORKERS"  # in the environment: any number of ranks
_LAUNCHERS = ("msrun", "mpirun", "torchrun", "bash", "sh")


@dataclass(frozen=True)
class Job:
    """Arguments of the launcher, see `USAGE`; `master_port` is None for any free one."""

    command: tuple[str, ...]
    worker_num: int = 8
    local_worker: int = 8
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    node_rank: int = 0
    log_dir: Path = Path("output/msrun_log")
    join: bool = True
    cluster_time_out: int = 7200

    @property
    def alone(self) -> bool:
        """Whether all ranks are on this server."""
        return self.local_worker == self.worker_num

    @property
    def logs(self) -> dict[str, Path]:
        """Files for the output of this server's processes: "rank N", "scheduler", and "msrun" itself."""
        first = self.node_rank * self.local_worker
        files = {f"rank {rank}": f"worker_{rank}.log" for rank in range(first, first + self.local_worker)}
        if self.node_rank == 0:
            files["scheduler"] = "scheduler.log"
        files["msrun"] = "msrun.log" if self.alone else f"msrun_node_{self.node_rank}.log"
        return {name: self.log_dir / file for name, file in files.items()}

    @property
    def log_folder(self) -> LogFolder:
        return LogFolder(self.log_dir, f"LOG_DIR {self.log_dir}", "choose another folder")

    def make_room_for_logs(self) -> None:
        """Moves logs of earlier jobs away and creates that of msrun; LaunchError if it cannot be written.

        Other servers may share the folder and have started: then only logs that this server is going to write are old.
        """
        patterns = ("worker_*.log", "scheduler.log", "msrun.log", "msrun_node_*.log")
        earlier = (path for pattern in patterns for path in self.log_dir.glob(pattern))
        self.log_folder.make_room(earlier if self.alone else self.logs.values(), [self.logs["msrun"]])


def parse(arguments: Sequence[str]) -> Job:
    """Reads the arguments of the launcher; LaunchError if one is wrong."""
    names, command = _names(arguments), _command(arguments[0])
    given = {name.lower(): _value(name, text) for name, text in zip(names, arguments[1:])}
    given.setdefault("local_worker", given.get("worker_num", Job.worker_num))
    job = Job(command, **given)
    if job.worker_num % job.local_worker:
        raise LaunchError(
            f"WORKER_NUM {job.worker_num} is not a multiple of LOCAL_WORKER {job.local_worker}; "
            "all servers start the same number"
        )
    servers = job.worker_num // job.local_worker
    if job.node_rank >= servers:
        raise LaunchError(
            f"NODE_RANK {job.node_rank}: with WORKER_NUM {job.worker_num} and LOCAL_WORKER {job.local_worker} there "
            f"are {servers} servers, numbered from 0"
        )
    return job


def _names(arguments: Sequence[str]) -> tuple[str, ...]:
    """Names of the arguments after the script; their number selects the form."""
    number = len(arguments)
    if number in (1, 2):
        return _ONE_SERVER[: number - 1]
    # Two forms have 6 arguments. The fifth is JOIN in one, MASTER_PORT in the other.
    if number == 6 and not arguments[4].isdecimal():
        return _ONE_SERVER
    if 6 <= number <= 9:
        return _MANY_SERVERS[: number - 1]
    raise LaunchError(
        f"{number} arguments; there are forms with 1, 2, 6, and for many servers 6 to 9. The script and its arguments "
        "are one word, in quotes. See msrun_launcher.sh --help"
    )


def _value(name: str, text: str) -> Any:
    """The value of an argument."""
    if name in _LIMITS:
        if not (text.isascii() and text.isdecimal()):
            remedy = product_hint(text) or "the arguments are in the order of --help"
            raise LaunchError(f"{name} {text}: not a whole number; {remedy}")
        number, (least, most) = int(text), _LIMITS[name]
        if number < least or (most is not None and number > most):
            allowed = f"{least} to {most}" if most is not None else f"at least {least}"
            raise LaunchError(f"{name} {text}: must be {allowed}; the arguments are in the order of --help")
        return number
    if name == "JOIN":
        if text not in ("True", "False"):
            raise LaunchError(f"JOIN {text}: must be True or False")
        return text == "True"
    if name == "LOG_DIR":
        if not text:
            raise LaunchError(f"LOG_DIR is empty; the default is {Job.log_dir}")
        return Path(text)
    return text


def _command(text: str) -> tuple[str, ...]:
    """Splits script and arguments like a shell."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{text}: quotes do not match ({str(error).lower()})") from None
    if words and words[0] in ("python", "python3"):
        words = words[1:]
    if not words:
        raise LaunchError('the first argument is empty; give a script, as in "run_glm.py --config X.yaml"')
    script = words[0]
    if script in _LAUNCHERS or script.startswith("-"):
        raise LaunchError(f"{script}: the first argument begins with a Python script; the launcher calls msrun itself")
    if script.isdecimal():
        order = "the first argument is the script with its arguments in quotes, the numbers follow"
        raise LaunchError(f"{script}: not a script; {order}")
    if not Path(script).is_file():
        beside = Path(__file__).resolve().parents[2] / script
        found = f"it is {beside}: cd {beside.parent} first, or give that path"
        remedy = found if beside.is_file() else "check the path"
        raise LaunchError(f"{script}: no such file in {Path.cwd()}; {remedy}")
    return tuple(words)


def check_machine(job: Job) -> None:
    """Raises LaunchError if this machine has no MindSpore, or if `master_addr` does not fit `node_rank`."""
    if importlib.util.find_spec("mindspore") is None:
        raise LaunchError(
            f"{sys.executable} has no MindSpore; activate the environment that has it, or give its interpreter: "
            "PYTHON=/path/to/python bash scripts/msrun_launcher.sh ..."
        )
    if job.alone:
        return  # the address has no effect
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(job.master_addr.strip("[]"), None)}
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR {job.master_addr}: no such host ({error.strerror})") from None
    here = any(is_local(address) for address in found)
    if here and job.node_rank:
        raise LaunchError(
            f"MASTER_ADDR {job.master_addr} is this server, but NODE_RANK is {job.node_rank}; give the address of the "
            "server with NODE_RANK 0, as the others see it"
        )
    if not here and not job.node_rank:
        raise LaunchError(
            f"NODE_RANK is 0, but MASTER_ADDR {job.master_addr} is not an address of this server; give one, "
            "as the others see it, or the NODE_RANK of this server"
        )
    if any(address.startswith("127.") or address == "::1" for address in found):
        raise LaunchError(f"MASTER_ADDR {job.master_addr}: the other servers cannot reach it; give another address")


def check_workers(job: Job) -> None:
    """Raises LaunchError for more ranks than this server has cards, or cores without any, unless they are forced."""
    forced = os.environ.get(FORCE, "0") != "0" or os.environ.get("MS_SIMULATION_LEVEL")
    words = " ".join(job.command).replace("=", " ").split()
    on_cpu = any(key.endswith("device_target") and value == "CPU" for key, value in zip(words, words[1:]))
    cards = 0 if on_cpu else len(ascend_cards())
    limit, kind = (cards, "Ascend cards") if cards else (usable_cores(), "cores that this process may use")
    if job.local_worker > limit and not forced:
        raise LaunchError(
            f"{job.local_worker} ranks on a server with {limit} {kind}; give WORKER_NUM (default {Job.worker_num}), or "
            f"LOCAL_WORKER, of at most {limit}, or set {FORCE}=1"
        )


def reserve_port(job: Job) -> tuple[int, AbstractContextManager]:
    """The port of the scheduler, and its claim (see `claim_port`) on the server of the scheduler.

    Raises LaunchError if MASTER_PORT was given and is taken on this server.
    """
    wanted = port = job.master_port or DEFAULT_PORT
    if job.node_rank:
        return port, nullcontext()
    holder = claim_port(port)
    if holder is None and job.master_port is not None:
        raise LaunchError(f"MASTER_PORT {port} is taken by another program of this server; give another one")
    while holder is None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        holder = claim_port(port)
    if port != wanted:
        say(f"note: port {wanted} is taken; using {port}")
    return port, holder


def msrun_command(job: Job, port: int) -> list[str]:
    """Command line of msrun, which returns when the processes are started.

    With `--join True` it would also put the log folder into a line for the shell, unquoted.
    """
    servers = [] if job.alone else ["--master_addr", job.master_addr, "--node_rank", str(job.node_rank)]
    return [
        "msrun", "--worker_num", str(job.worker_num), "--local_worker_num", str(job.local_worker),
        "--master_port", str(port), *servers, "--log_dir", str(job.log_dir), "--join", "False",
        "--cluster_time_out", str(job.cluster_time_out), *_interpreter(), *job.command,
    ]  # fmt: skip


def _interpreter() -> tuple[str, ...]:
    """Arguments with which msrun starts this interpreter; none if it is called python."""
    folder = Path(sys.executable).absolute().parent
    for name, arguments in (("python", ()), ("python3", ("python3",))):
        path = folder / name
        if path.exists() and path.samefile(sys.executable):
            return arguments
    raise LaunchError(
        f"msrun starts `python` or `python3`, and {sys.executable} has neither name; make a virtual environment with "
        f"it: {sys.executable} -m venv .venv"
    )


def launch(arguments: Sequence[str]) -> int:
    """Starts a job and, unless `join` is False, waits for its end; returns the exit status (see `RankJob.wait`).

    Raises LaunchError or OSError if the job cannot be started.
    """
    job = parse(arguments)
    check_machine(job)
    check_workers(job)
    interrupts = Interrupts()
    environment = job_environment()
    if shutil.which("msrun", path=environment["PATH"]) is None:
        raise LaunchError(f"no msrun beside {sys.executable} or on PATH; reinstall MindSpore there")
    with job.log_folder.claim():
        port, port_claim = reserve_port(job)
        with port_claim:
            command = msrun_command(job, port)
            job.make_room_for_logs()
            say(shlex.join(command))
            if not job.join:
                status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
                started = f"started, and not watched; logs: {job.log_dir}"
                say(f"error: msrun: exit status {status}" if status else started)
                return status
            with guarded(environment) as own_environment:
                members = start_and_adopt(job, command, own_environment, interrupts)
                if not members:
                    say("interrupted while the ranks were being started")
                    return 128 + interrupts.received
                return RankJob(members, interrupts, job.alone).wait()


def start_and_adopt(job: Job, command: list[str], environment: dict[str, str], interrupts: Interrupts) -> list[Member]:
    """Runs msrun to its end, or to an interrupt; the processes that it started become children of this one.

    Returns the processes; none after an interrupt, which ends them. Raises LaunchError if msrun failed.
    """
    reports, end_of_msrun = os.pipe()
    program = shutil.which(command[0], path=environment["PATH"])
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])
    msrun_log = job.logs["msrun"]
    with msrun_log.open("wb") as log, open(reports, encoding="ascii") as lines:
        try:
            msrun = subprocess.Popen(
                [sys.executable, "-m", "glm_ms.launch.msrun_start", str(end_of_msrun), str(program), *command[1:]],
                env={**environment, "PYTHONPATH": path}, pass_fds=[end_of_msrun],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        finally:
            os.close(end_of_msrun)
        while msrun.poll() is None and not interrupts.received:
            time.sleep(0.05)
        if interrupts.received:
            kill_descendants()
            return []
        started = lines.read().splitlines()
    if msrun.returncode != 0:
        reason = reason_in(msrun_log.read_text(encoding="utf-8", errors="replace"))
        raise LaunchError(f"msrun failed (exit status {msrun.returncode}), log: {msrun_log}\n{reason}")
    members = []
    for process, role, rank in map(str.split, started):
        name = "scheduler" if role == "MS_SCHED" else f"rank {rank}"
        if name in job.logs:  # other processes are helpers of msrun
            members.append(Member(int(process), name, job.logs[name], is_rank=name != "scheduler"))
    first = next((member.name for member in members if member.is_rank), None)
    if first is None:
        raise LaunchError(f"msrun has started no rank; log: {msrun_log}")
    elsewhere = "" if job.node_rank == 0 else " (the server with NODE_RANK 0 shows rank 0)"
    say(f"{job.local_worker} ranks started; {first} follows{elsewhere}, all logs: {job.log_dir}")
    return members


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(USAGE, launch, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
