"""The arguments of scripts/msrun_launcher.sh, in the order that users of MindFormers know."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glm_ms.launch.rank_job import LaunchError

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
"""
_ONE_SERVER = ("WORKER_NUM", "MASTER_PORT", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT")
_MANY_SERVERS = (
    "WORKER_NUM", "LOCAL_WORKER", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT",
)  # fmt: skip
DEFAULT_PORT = 8118
_LAUNCHERS = ("msrun", "mpirun", "torchrun", "bash", "sh")


@dataclass(frozen=True)
class Job:
    """Arguments of the launcher, see `USAGE`; `port` is None for any free one."""

    command: tuple[str, ...]
    worker_num: int = 8
    local_worker: int = 8
    master_addr: str = "127.0.0.1"
    port: int | None = None
    node_rank: int = 0
    log_dir: Path = field(default=Path("output/msrun_log"))
    join: bool = True
    cluster_time_out: int = 7200

    @property
    def alone(self) -> bool:
        """Whether all ranks are on this server."""
        return self.local_worker == self.worker_num

    @property
    def first_rank(self) -> int:
        """First rank of this server."""
        return 0 if self.alone else self.node_rank * self.local_worker

    def worker_log(self, rank: int) -> Path:
        """File for the output of a rank."""
        return self.log_dir / f"worker_{rank}.log"

    def former_logs(self) -> list[Path]:
        """Existing logs of earlier jobs in `log_dir`.

        Other servers may share the folder and have started: then only the logs that this server is going to write.
        """
        if not self.alone:
            return [path for path in self.logs() if path.exists()]
        names = ("worker_*.log", "scheduler.log", "msrun.log", "msrun_node_*.log")
        return sorted(path for name in names for path in self.log_dir.glob(name) if path.is_file())

    def logs(self) -> list[Path]:
        """Logs that this server writes."""
        own = [self.worker_log(self.first_rank + number) for number in range(self.local_worker)]
        return [*own, *([self.log_dir / "scheduler.log"] if self.node_rank == 0 else []), self.msrun_log]

    @property
    def msrun_log(self) -> Path:
        """File for the output of msrun itself."""
        return self.log_dir / ("msrun.log" if self.alone else f"msrun_node_{self.node_rank}.log")


def parse(arguments: Sequence[str]) -> Job:
    """Reads the arguments of the launcher.

    Raises:
        LaunchError: an argument is wrong.
    """
    names = _names(arguments)
    given = dict(zip(names, arguments[1:]))
    command = _command(arguments[0])
    worker_num = _whole("WORKER_NUM", given.get("WORKER_NUM", "8"), 1)
    local_worker = _whole("LOCAL_WORKER", given.get("LOCAL_WORKER", str(worker_num)), 1)
    if worker_num % local_worker:
        raise LaunchError(
            f"WORKER_NUM {worker_num} is not a multiple of LOCAL_WORKER {local_worker}; "
            "all servers start the same number"
        )
    node_rank = _whole("NODE_RANK", given.get("NODE_RANK", "0"), 0)
    if node_rank >= worker_num // local_worker:
        raise LaunchError(
            f"NODE_RANK {node_rank}: with WORKER_NUM {worker_num} and LOCAL_WORKER {local_worker} there are "
            f"{worker_num // local_worker} servers, numbered from 0"
        )
    port = _whole("MASTER_PORT", given["MASTER_PORT"], 1024, 65535) if "MASTER_PORT" in given else None
    join = given.get("JOIN", "True")
    if join not in ("True", "False"):
        raise LaunchError(f"JOIN {join}: must be True or False")
    if not given.get("LOG_DIR", "output"):
        raise LaunchError("LOG_DIR is empty; the default is output/msrun_log")
    return Job(
        command,
        worker_num,
        local_worker,
        given.get("MASTER_ADDR", Job.master_addr),
        port,
        node_rank,
        Path(given.get("LOG_DIR", "output/msrun_log")),
        join == "True",
        _whole("CLUSTER_TIME_OUT", given.get("CLUSTER_TIME_OUT", "7200"), 1),
    )


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


def _whole(name: str, text: str, least: int, most: int | None = None) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"{name} {text}: not a whole number; the arguments are in the order of --help")
    number = int(text)
    if number < least or (most is not None and number > most):
        allowed = f"{least} to {most}" if most is not None else f"at least {least}"
        raise LaunchError(f"{name} {text}: must be {allowed}; the arguments are in the order of --help")
    return number


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
        raise LaunchError(
            f"{script}: not a script; the first argument is the script with its arguments in quotes, the numbers follow"
        )
    if not Path(script).is_file():
        beside = Path(__file__).resolve().parents[2] / script
        found = f"it is {beside}: cd {beside.parent} first, or give that path"
        remedy = found if beside.is_file() else "check the path"
        raise LaunchError(f"{script}: no such file in {Path.cwd()}; {remedy}")
    return tuple(words)
