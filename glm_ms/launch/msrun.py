"""Starts a job with msrun, watches its ranks, and ends it as a whole: the program behind scripts/msrun_launcher.sh.

msrun alone either returns at once or waits without telling which rank failed why. Here it starts the processes and
ends; they are adopted, so that each exit status is known at once.
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
from collections.abc import Callable, Sequence
from pathlib import Path

from glm_ms.launch.addresses import is_local, take_port
from glm_ms.launch.guard import Guard
from glm_ms.launch.msrun_arguments import DEFAULT_PORT, USAGE, Job, LaunchError, parse
from glm_ms.launch.processes import Interrupts, adopt_orphans, claim, clean_environment
from glm_ms.launch.rank_job import Member, RankJob, end_started
from glm_ms.launch.rank_logs import keep_earlier_logs, reason_in


def check_machine(job: Job) -> None:
    """Whether this machine can start the job.

    Raises:
        LaunchError: no MindSpore or msrun, or `master_addr` does not fit `node_rank`.
    """
    if importlib.util.find_spec("mindspore") is None:
        raise LaunchError(
            f"{sys.executable} has no MindSpore; activate the environment that has it, or name its interpreter: "
            "PYTHON=/path/to/python bash scripts/msrun_launcher.sh ..."
        )
    if job.alone:
        return  # the address does not matter, this server is the only one
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(job.master_addr.strip("[]"), None)}
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
            f"NODE_RANK is 0, but MASTER_ADDR {job.master_addr} is not an address of this server; give one of its own, "
            "as the others see it, or the NODE_RANK of this server"
        )
    if any(address.startswith("127.") or address == "::1" for address in found):
        raise LaunchError(
            f"MASTER_ADDR {job.master_addr}: the other servers cannot reach it; give this server's own"
        )


def reserve_port(job: Job, say: Callable[[str], None]) -> tuple[int, socket.socket | None]:
    """The port of the scheduler, and what keeps other launchers of this machine from choosing it too.

    Raises:
        LaunchError: MASTER_PORT was given and is taken here.
    """
    if job.node_rank:
        return job.port or DEFAULT_PORT, None
    wanted = job.port or DEFAULT_PORT
    holder = take_port(wanted)
    if holder is not None:
        return wanted, holder
    if job.port is not None:
        raise LaunchError(
            f"MASTER_PORT {wanted} is taken by another program of this server; give another one"
        )
    while holder is None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        holder = take_port(port)
    say(f"note: port {wanted} is taken; using {port}")
    return port, holder


def msrun_command(job: Job, port: int) -> list[str]:
    """The command line of msrun. It returns once the processes are started."""
    servers = [] if job.alone else ["--master_addr", job.master_addr, "--node_rank", str(job.node_rank)]
    return [
        "msrun", "--worker_num", str(job.worker_num), "--local_worker_num", str(job.local_worker),
        "--master_port", str(port), *servers, "--log_dir", str(job.log_dir), "--join", "False",
        "--cluster_time_out", str(job.cluster_time_out), *_interpreter(), *job.command,
    ]  # fmt: skip


def _interpreter() -> tuple[str, ...]:
    """What msrun must be told to start this interpreter; nothing where that is called python."""
    folder = Path(sys.executable).absolute().parent
    for name, told in (("python", ()), ("python3", ("python3",))):
        path = folder / name
        if path.exists() and path.samefile(sys.executable):
            return told
    raise LaunchError(
        f"msrun starts `python` or `python3`, and {sys.executable} has neither name; make a virtual environment with "
        f"it: {sys.executable} -m venv .venv"
    )


def make_room_for_logs(job: Job) -> Path | None:
    """Makes LOG_DIR and moves former logs away; where those are now, if there were any.

    Raises:
        LaunchError: logs cannot be written there.
    """
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        kept = keep_earlier_logs(job.log_dir, job.former_logs())
        job.msrun_log.touch()
    except OSError as error:
        raise LaunchError(
            f"LOG_DIR {job.log_dir}: logs cannot be written there ({error.strerror}: {error.filename}); give another "
            "one"
        ) from None
    return kept


def launch(job: Job, say: Callable[[str], None], show: Callable[[bytes], None]) -> int:
    """Starts a job and, unless `join` is False, waits for its end.

    Returns:
        The exit status: see `RankJob.wait`.

    Raises:
        LaunchError: it cannot be started.
        OSError: the logs cannot be written.
    """
    check_machine(job)
    interrupts = Interrupts()
    environment = clean_environment(say)
    if shutil.which("msrun", path=environment["PATH"]) is None:
        raise LaunchError(f"no msrun beside {sys.executable} or on PATH; install MindSpore there anew")
    log_dir_holder = claim(f"logs {job.log_dir.resolve()}")
    if log_dir_holder is None:
        raise LaunchError(f"LOG_DIR {job.log_dir}: another job is writing its logs there; give another one")
    port, port_holder = reserve_port(job, say)
    command = msrun_command(job, port)
    kept = make_room_for_logs(job)
    if kept is not None:
        say(f"logs of a former job: {kept}")
    say(shlex.join(command))
    if not job.join:
        status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        say(
            f"started, and not watched; logs: {job.log_dir}"
            if status == 0
            else f"error: msrun: exit status {status}"
        )
        return status
    adopt_orphans()
    guard = Guard(environment)
    try:
        members = start_and_adopt(job, command, guard.environment, interrupts)
        if interrupts.received:
            end_started()
            say("interrupted while the ranks were being started")
            return 128 + interrupts.received
        first = job.first_rank
        elsewhere = "" if first == 0 else " (what rank 0 says is shown on the server with NODE_RANK 0)"
        say(f"{job.local_worker} ranks started; rank {first} follows{elsewhere}, all logs: {job.log_dir}")
        return RankJob(members, interrupts, say, show, job.alone).wait()
    except BaseException:
        end_started()
        raise
    finally:
        guard.dismiss()
        for holder in (log_dir_holder, port_holder):
            if holder is not None:
                holder.close()


def start_and_adopt(
    job: Job, command: list[str], environment: dict[str, str], interrupts: Interrupts
) -> dict[int, Member]:
    """Runs msrun to its end; the processes that it has started are children of this one then.

    Returns:
        The processes; none after an interrupt.

    Raises:
        LaunchError: msrun failed; what it started has ended.
    """
    reports, end_of_msrun = os.pipe()
    program = shutil.which(command[0], path=environment["PATH"])
    with job.msrun_log.open("wb") as log, open(reports, encoding="ascii") as lines:
        try:
            msrun = subprocess.Popen(
                [sys.executable, "-m", "glm_ms.launch.msrun_start", str(end_of_msrun), str(program), *command[1:]],
                env={**environment, "PYTHONPATH": _with_this_package(environment)}, pass_fds=[end_of_msrun],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
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
        said = reason_in(job.msrun_log.read_text(encoding="utf-8", errors="replace"))
        raise LaunchError(f"msrun failed (exit status {msrun.returncode}), log: {job.msrun_log}\n{said}")
    members = {}
    for line in started:
        process, role, rank = line.split()
        if role == "MS_SCHED":
            members[int(process)] = Member("scheduler", job.log_dir / "scheduler.log", is_rank=False)
        elif rank != "-":  # others are helpers of msrun, which it waits for
            members[int(process)] = Member(f"rank {rank}", job.worker_log(int(rank)))
    if not any(member.is_rank for member in members.values()):
        raise LaunchError(f"msrun has started no rank; log: {job.msrun_log}")
    return members


def _with_this_package(environment: dict[str, str]) -> str:
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])


def main(arguments: Sequence[str], say: Callable[[str], None], show: Callable[[bytes], None]) -> int:
    """Returns the exit status: 2 for wrong arguments or a job that cannot be started, else as `launch`."""
    if not arguments:
        say(USAGE)
        return 2
    if arguments[0] in ("-h", "--help"):
        show(USAGE.encode())
        return 0
    try:
        return launch(parse(arguments), say, show)
    except (LaunchError, OSError) as error:
        say(f"error: {error}")
        return 2


def say_on_stderr(line: str) -> None:
    """For the programs of this package."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def show_on_stdout(piece: bytes) -> None:
    """For the programs of this package: bytes as they are, progress bars included."""
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], say_on_stderr, show_on_stdout))
