"""Starts run_glm.py on this server's cards of a rank table: the program of scripts/run_distribute.sh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_ms.launch.processes import Interrupts, is_local
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
from glm_ms.launch.rank_table import RankTable, Server, name_numbers, read_rank_table
from glm_ms.spelling import tool

USAGE = """\
usage: run_distribute.sh RANK_TABLE_FILE CONFIG_PATH DEVICE_RANGE RUN_STATUS [RANK_SIZE] [--flag value ...]
       run_distribute.sh RANK_TABLE_FILE CONFIG_PATH DEVICE_RANGE predict [RANK_SIZE] PREDICT_DATA [--flag value ...]

Starts run_glm.py with --use_parallel True, one process per card of this server, shows the first one live, and waits.
When a rank fails, or the launcher is interrupted or killed, all ranks of this server end; the first failing rank's
traceback and log are named. With several servers, start it on each of them.

  RANK_TABLE_FILE  from tools/hccl_tools.py; of several servers, from tools/merge_hccl.py
  CONFIG_PATH      YAML file of the run
  DEVICE_RANGE     "[0,8)": this server's cards 0 to 7; with several servers also its ranks, as "[8,16)"
  RUN_STATUS       train, finetune, eval or predict
  RANK_SIZE        number of cards of all servers together; needed for several servers
  PREDICT_DATA     a prompt, or a .txt or .jsonl file of prompts
  --flag value     and all that follows is passed to run_glm.py unchanged; see python run_glm.py --help

The launcher finds this server in the table by its addresses. If that fails (in a container), set SERVER_ID to its
server_id or its number in the table, from 0. Logs: output/distribute_log/rank_N/run_glm.log.
"""
LOG_DIR = Path("output/distribute_log")
LOG_NAME = "run_glm.log"
RUN_STATUSES = ("train", "finetune", "eval", "predict")
_RANGE = re.compile(r"\[(\d{1,5}),\s*(\d{1,5})[)\]]", re.ASCII)


@dataclass(frozen=True)
class Request:
    """Arguments of the launcher, see `USAGE`."""

    rank_table: str
    numbers: range  # cards, or ranks, of DEVICE_RANGE
    rank_size: int | None
    command: tuple[str, ...]  # command line of every rank


def parse(arguments: Sequence[str]) -> Request:
    """Reads the arguments; LaunchError if one is wrong."""
    number = next((n for n, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    words, flags = arguments[:number], arguments[number:]
    if len(words) < 4:
        raise LaunchError(
            f"{len(words)} arguments; RANK_TABLE_FILE CONFIG_PATH DEVICE_RANGE RUN_STATUS are needed. "
            "See run_distribute.sh --help"
        )
    table, config, cards, run_status, *rest = words
    if Path(table).suffix in (".yaml", ".yml") and Path(config).suffix == ".json":
        raise LaunchError(f"RANK_TABLE_FILE comes before CONFIG_PATH; did you mean {config} {table}?")
    for name, path in (("RANK_TABLE_FILE", table), ("CONFIG_PATH", config)):
        if not Path(path).is_file():
            raise LaunchError(f"{name} {path}: no such file in {Path.cwd()}; check the path")
    if run_status not in RUN_STATUSES:
        raise LaunchError(f"RUN_STATUS {run_status}: must be one of {', '.join(RUN_STATUSES)}")
    prompt = []
    if run_status == "predict" and rest:
        prompt = ["--predict_data", rest.pop()]
        if prompt[1].isdecimal() and not rest:
            raise LaunchError(
                f"{prompt[1]}: with predict, the last argument is PREDICT_DATA, and RANK_SIZE comes before it; "
                "write a prompt that is a number into a .txt file"
            )
    flag_form = "flags of run_glm.py begin with -- (write key.sub=value as --key.sub value)"
    if len(rest) > 1:
        raise LaunchError(f"{rest[1]}: one argument too many; {flag_form}")
    if rest and (not (rest[0].isascii() and rest[0].isdecimal()) or int(rest[0]) < 1):
        raise LaunchError(f"RANK_SIZE {rest[0]}: not a number of cards; {product_hint(rest[0]) or flag_form}")
    script = Path(__file__).resolve().parents[2] / "run_glm.py"
    parallel = ["--use_parallel", "True"]
    if any(flag.partition("=")[0] == parallel[0] for flag in flags):
        parallel = []  # a flag may not be given twice
    given = ["--config", config, *parallel, "--run_mode", run_status, *prompt, *flags]
    rank_size = int(rest[0]) if rest else None
    return Request(table, device_range(cards), rank_size, (sys.executable, str(script), *given))


def device_range(text: str) -> range:
    """Numbers of "[0,8)". "[0,8]" means the same, as in the scripts of MindFormers."""
    match = _RANGE.fullmatch(text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise LaunchError(f'DEVICE_RANGE {text}: not a range such as "[0,8)", which means 0 to 7; keep the quotes')
    return range(int(match[1]), int(match[2]))


def this_server(table: RankTable, server_id: str | None) -> Server:
    """Finds this machine in a table; LaunchError if no server, or several, can be this machine.

    `server_id` is the environment variable SERVER_ID: a server_id of the table, or a number in it.
    """
    known = ", ".join(f"{number}: {server.server_id}" for number, server in enumerate(table.servers))
    if server_id:
        named = [server for server in table.servers if server.server_id == server_id]
        if not named and server_id.isdecimal() and int(server_id) < len(table.servers):
            named = [table.servers[int(server_id)]]
        if not named:
            raise LaunchError(f"SERVER_ID {server_id}: not in {table.source}, which has {known}")
        return named[0]
    if len(table.servers) == 1:
        return table.servers[0]
    here = [server for server in table.servers if is_local(server.server_id)]
    if len(here) != 1:
        which = "none" if not here else ", ".join(server.server_id for server in here)
        raise LaunchError(
            f"{table.source}: of its servers ({known}) {which} has an address of this machine; select one: "
            "SERVER_ID=0 bash scripts/run_distribute.sh ..."
        )
    return here[0]


def check_size(request: Request, table: RankTable) -> None:
    """Raises `LaunchError` if RANK_SIZE differs from the table, or is needed and missing."""
    if len(table.servers) > 1 and request.rank_size is None:
        raise LaunchError(
            f"{table.source}: has {len(table.servers)} servers; for a run on all of them add RANK_SIZE "
            f"{table.rank_size}, for one server give a table of that server alone"
        )
    if request.rank_size not in (None, table.rank_size):
        raise LaunchError(f"RANK_SIZE {request.rank_size}, but {table.source} has {table.rank_size} cards")


def check_cards(request: Request, table: RankTable, server: Server) -> None:
    """Raises `LaunchError` if DEVICE_RANGE differs from the cards, or ranks, of this server in the table."""
    several = len(table.servers) > 1
    cards = sorted(device.device_id for device in server.devices)
    ranks = sorted(device.rank_id for device in server.devices)
    wanted = list(request.numbers)
    if wanted != cards and not (several and wanted == ranks):
        as_ranks = f" (ranks {name_numbers(ranks)})" if several else ""
        raise LaunchError(
            f"DEVICE_RANGE names {name_numbers(wanted)}, but in {table.source} server {server.server_id} has the cards "
            f"{name_numbers(cards)}{as_ranks}; make a table of other cards with {tool('hccl_tools')} --device_num"
        )


def launch(arguments: Sequence[str]) -> int:
    """Starts the ranks of this server and waits for their end; returns the exit status (see `RankJob.wait`).

    Raises LaunchError, RankTableError or OSError if the job cannot be started.
    """
    request = parse(arguments)
    table = read_rank_table(request.rank_table)
    check_size(request, table)
    server = this_server(table, os.environ.get("SERVER_ID"))
    check_cards(request, table, server)
    interrupts = Interrupts()
    alone = len(table.servers) == 1
    devices = sorted(server.devices, key=lambda device: device.rank_id)
    logs = [LOG_DIR / f"rank_{device.rank_id}" / LOG_NAME for device in devices]
    folder = LogFolder(LOG_DIR, str(LOG_DIR), "start this one in another folder")
    with folder.claim():
        # Other servers may share the folder and have started: then only the logs of these ranks are old.
        folder.make_room(LOG_DIR.glob(f"rank_*/{LOG_NAME}") if alone else logs, logs)
        whole = {"RANK_TABLE_FILE": str(Path(request.rank_table).resolve()), "RANK_SIZE": str(table.rank_size)}
        with guarded({**job_environment(), **whole}) as environment:
            members = []
            for device, log in zip(devices, logs):
                own = {"RANK_ID": str(device.rank_id), "DEVICE_ID": str(device.device_id)}
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        request.command, env={**environment, **own}, stdin=subprocess.DEVNULL, stdout=file,
                        stderr=file, start_new_session=True
                    )  # fmt: skip
                process.returncode = 0  # so that only the job waits for it, not this object
                members.append(Member(process.pid, f"rank {device.rank_id}", log))
            names, first = name_numbers([device.rank_id for device in devices]), members[0].name
            say(f"ranks {names} of {table.rank_size} started; {first} follows, all logs: {LOG_DIR}")
            return RankJob(members, interrupts, alone).wait()


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(USAGE, launch, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
