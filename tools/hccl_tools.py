"""Makes the rank table of this server, from /etc/hccn.conf or hccn_tool.

    python tools/hccl_tools.py --device_num "[0,8)" --server_ip 10.0.0.1

writes hccl_8p_01234567_10.0.0.1.json to the current folder. To train on several servers, make one table on each,
bring them to one folder and merge them with tools/merge_hccl.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.launch.hccn import card_range, host_address, note_on_halves, physical_cards, read_addresses, visible_cards
from glm_ms.launch.rank_table import RankTableError, check_address, name_numbers, single_server, write_rank_table
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.atomic import check_target


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog='Example: python tools/hccl_tools.py --device_num "[0,8)" --server_ip 10.0.0.1',
    )
    parser.add_argument(
        "--device_num",
        default="[0,8)",
        metavar="RANGE",
        help='logical cards, in quotes: "[0,4)" is 0 to 3, "[3,4)" is 3 alone, "4" the first 4 (default: "[0,8)")',
    )
    parser.add_argument(
        "--visible_devices",
        metavar="CARDS",
        help='physical cards behind logical cards 0, 1, ..., such as "4,5,6,7" in a container that has those '
        "(default: the same numbers)",
    )
    parser.add_argument(
        "--server_ip",
        metavar="IP",
        help="address at which the other servers reach this one (default: that of the host name)",
    )
    parser.add_argument(
        "--hccn_conf",
        metavar="PATH",
        help="file with the addresses of the cards (default: /etc/hccn.conf, if there is one); "
        "hccn_tool gives those that it lacks",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file to write (default: hccl_8p_01234567_IP.json in the current folder, by number of cards, "
        "logical cards and server)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Makes one table; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    try:
        print(make_table(options))
    except (RankTableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def make_table(options: argparse.Namespace) -> str:
    """Makes the table and writes its file; returns what was done.

    Raises:
        RankTableError: an option, an address or the output is wrong.
    """
    logical = card_range(options.device_num)
    visible = None if options.visible_devices is None else visible_cards(options.visible_devices)
    cards = physical_cards(logical, visible)
    server = host_address() if options.server_ip is None else server_address(options.server_ip)
    output = default_output(logical, server) if options.output is None else options.output
    check_target(output, overwrite=options.overwrite, error=RankTableError)
    addresses, origin = read_addresses(cards, options.hccn_conf, note)
    half = note_on_halves(cards)
    if half:
        note(half)
    write_rank_table(single_server(server, addresses), output, overwrite=options.overwrite)
    several = "s" if len(cards) > 1 else ""
    ranks = name_numbers(range(len(cards)))
    return (
        f"{output}: server {server}, card{several} {name_numbers(cards)} as rank{several} {ranks}, "
        f"addresses from {origin}"
    )


def note(text: str) -> None:
    """Prints a remark."""
    print(f"note: {text}", file=sys.stderr)


def server_address(text: str) -> str:
    """The address given as --server_ip.

    Raises:
        RankTableError: not an address of one machine.
    """
    try:
        return check_address(text.strip(), loopback=True)
    except RankTableError as error:
        raise RankTableError(f"--server_ip: {error}; give it as 10.0.0.1") from None


def default_output(logical: Sequence[int], server: str) -> str:
    """Name of the file: number of cards, logical cards, server."""
    # scp reads the text before a colon as the name of a host.
    return f"hccl_{len(logical)}p_{''.join(map(str, logical))}_{server.replace(':', '-')}.json"


if __name__ == "__main__":
    sys.exit(main())
