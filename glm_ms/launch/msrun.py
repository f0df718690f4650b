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
from pathlib import Path

from glm_ms.launch.msrun_arguments import DEFAULT_PORT, USAGE, Job, parse
from glm_ms.launch.processes import Interrupts, claim, claim_port, clean_environment, is_local
from glm_ms.launch.rank_job import (
    LaunchError,
    Member,
    Say,
    Show,
    end_started,
    make_room_for_logs,
    run_command,
    run_ranks,
)
from glm_ms.launch.rank_logs import reason_in


def check_machine(job: Job) -> None:
    """Checks that this machine can start the job.

    Raises:
        LaunchError: MindSpore is missing, or `master_addr` does not fit `node_rank`.
    """
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


def reserve_port(job: Job, say: Say) -> tuple[int, socket.socket | None]:
    """The port of the scheduler, and its claim (see `claim_port`) on the server of the scheduler.

    Raises:
        LaunchError: MASTER_PORT was given and is taken on this server.
    """
    if job.node_rank:
        return job.port or DEFAULT_PORT, None
    wanted = job.port or DEFAULT_PORT
    holder = claim_port(wanted)
    if holder is not None:
        return wanted, holder
    if job.port is not None:
        raise LaunchError(f"MASTER_PORT {wanted} is taken by another program of this server; give another one")
    while holder is None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        holder = claim_port(port)
    say(f"note: port {wanted} is taken; using {port}")
    return port, holder


def msrun_command(job: Job, port: int) -> list[str]:
    """Command line of msrun, which returns when the processes are started."""
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


def launch(arguments: Sequence[str], say: Say, show: Show) -> int:
    """Starts a job and, unless `join` is False, waits for its end.

    Returns:
        The exit status: see `RankJob.wait`.

    Raises:
        LaunchError: the job cannot be started.
        OSError: the logs cannot be written.
    """
    job = parse(arguments)
    check_machine(job)
    interrupts = Interrupts()
    environment = clean_environment(say)
    if shutil.which("msrun", path=environment["PATH"]) is None:
        raise LaunchError(f"no msrun beside {sys.executable} or on PATH; reinstall MindSpore there")
    log_dir_holder = claim(f"logs {job.log_dir.resolve()}")
    if log_dir_holder is None:
        raise LaunchError(f"LOG_DIR {job.log_dir}: another job is writing its logs there; give another one")
    port, port_holder = reserve_port(job, say)
    command = msrun_command(job, port)
    make_room_for_logs(job.log_dir, job.former_logs, [job.msrun_log], f"LOG_DIR {job.log_dir}", say)
    say(shlex.join(command))
    if not job.join:
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        failed = f"error: msrun: exit status {status}"
        say(failed if status else f"started, and not watched; logs: {job.log_dir}")
        return status
    try:
        return run_ranks(
            lambda environment: start_and_adopt(job, command, environment, interrupts, say),
            environment, interrupts, say, show, job.alone
        )  # fmt: skip
    finally:
        for holder in (log_dir_holder, port_holder):
            if holder is not None:
                holder.close()


def start_and_adopt(
    job: Job, command: list[str], environment: dict[str, str], interrupts: Interrupts, say: Say
) -> dict[int, Member]:
    """Runs msrun to its end; the processes that it started become children of this one.

    Returns:
        The processes; none after an interrupt.

    Raises:
        LaunchError: msrun failed; all that it started has ended.
    """
    reports, end_of_msrun = os.pipe()
    program = shutil.which(command[0], path=environment["PATH"])
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])
    with job.msrun_log.open("wb") as log, open(reports, encoding="ascii") as lines:
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
            return {}
        started = lines.read().splitlines()
    if msrun.returncode != 0:
        end_started()
        reason = reason_in(job.msrun_log.read_text(encoding="utf-8", errors="replace"))
        raise LaunchError(f"msrun failed (exit status {msrun.returncode}), log: {job.msrun_log}\n{reason}")
    members = {}
    for line in started:
        process, role, rank = line.split()
        if role == "MS_SCHED":
            members[int(process)] = Member("scheduler", job.log_dir / "scheduler.log", is_rank=False)
        elif rank != "-":  # other processes are helpers of msrun
            members[int(process)] = Member(f"rank {rank}", job.worker_log(int(rank)))
    if not any(member.is_rank for member in members.values()):
        raise LaunchError(f"msrun has started no rank; log: {job.msrun_log}")
    first = job.first_rank
    elsewhere = "" if first == 0 else " (the server with NODE_RANK 0 shows rank 0)"
    say(f"{job.local_worker} ranks started; rank {first} follows{elsewhere}, all logs: {job.log_dir}")
    return members


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(USAGE, launch, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
