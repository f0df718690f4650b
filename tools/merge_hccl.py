"""Merges the rank tables of several servers into one.

    python tools/merge_hccl.py hccl_8p_01234567_10.0.0.1.json hccl_8p_01234567_10.0.0.2.json
    python tools/merge_hccl.py hccl_8p_*.json

writes hccl_2s_16p.json to the current folder: servers in the order of the files, the first has rank 0. A shell sorts
the names behind "*" as text, 10.0.0.10 before 10.0.0.2; give the files one by one if the order matters.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.launch.rank_table import RankTableError, merge, read_rank_table, write_rank_table
from glm_ms.program import program
from glm_ms.storage.arguments import Parser


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/merge_hccl.py hccl_8p_*.json",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="rank tables of tools/hccl_tools.py; the first server has rank 0, and so on in this order",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file to write (default: hccl_2s_16p.json in the current folder, by numbers of servers and cards)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Merges once; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    try:
        print(merge_files(options.files, options.output, options.overwrite))
    except (RankTableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def merge_files(files: Sequence[str], output: str | None, overwrite: bool) -> str:
    """Merges files and writes the result; returns what was done.

    Raises:
        RankTableError: a file is wrong, they do not fit together, or the output cannot be written.
    """
    given: dict[Path, str] = {}
    for file in files:
        path = Path(os.path.realpath(file))
        if path in given:
            raise RankTableError(f"{file}: given twice")
        given[path] = file
    table = merge([read_rank_table(file) for file in files])
    if output is None:
        output = f"hccl_{len(table.servers)}s_{table.rank_size}p.json"
    write_rank_table(table, output, overwrite=overwrite)
    order = ", ".join(server.server_id for server in table.servers)
    return f"{output}: {len(table.servers)} servers, {table.rank_size} cards, in the order {order}"


if __name__ == "__main__":
    sys.exit(main())
